"""Decompresses the pixels of DICOM and TIFF in a process of its own.

The C and C++ libraries behind JPEG, JPEG-LS, JPEG 2000 and TIFF crash, hang or ask for any amount of
memory on damaged files; that must cost one case and not the run. The process is started with the first
compressed file and ends with the process that started it. It never sees more than one file at a time.
"""

from __future__ import annotations

import atexit
import io
import os
import resource
import signal
import socket
import subprocess
import sys
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np

from common.errors import UnusableCase

TIMEOUT_SECONDS = 120.0  # the largest images take a few seconds; this is for those that never end
PATIENCE_SECONDS = 5.0  # for a child whose connection was closed
MEMORY_BYTES = 2**33  # address space: libraries, and some copies of the largest image
IMAGE, MASK = b"I", b"M"  # what a file holds
COMPLAINTS = (b"Corrupt JPEG data", b"Premature end", b"TIFF", b"LZW", b"tempfile.tif")
"""What libjpeg and libtiff say on stderr before they return noise."""


@dataclass(frozen=True, kw_only=True)
class _Child:
    process: subprocess.Popen[bytes]
    connection: Connection
    parent: int


_children: list[_Child] = []  # the one that is warm, if any
_at_exit: list[object] = []  # whether it is going to be ended


def stored_pixels(content: bytes, *, mask: bool = False) -> np.ndarray:
    """Returns the stored values of a DICOM or TIFF file, as ``dicom.stored_pixels`` and ``raster.pixels``.

    Args:
        mask: of a TIFF with a palette, the numbers of its colours.

    Raises:
        UnusableCase: no library decodes it, or the decoder crashed (``unreadable``) or did not end
            (``too_slow``).
        MemoryError: the decoder was killed, as the kernel does when memory runs out.
    """
    pixels: np.ndarray = np.load(io.BytesIO(_answer_to(content, mask=mask)), allow_pickle=False)
    return pixels


def check_jpeg(content: bytes) -> None:
    """Has a JPEG picture decoded by a library that says when it meets damage; Pillow's keeps silent.

    Raises:
        UnusableCase, MemoryError: as ``stored_pixels``.
    """
    _answer_to(content)


def _answer_to(content: bytes, *, mask: bool = False) -> bytes:
    child = _warm()
    try:
        child.connection.send_bytes(MASK if mask else IMAGE)
        child.connection.send_bytes(content)
        if not child.connection.poll(TIMEOUT_SECONDS):
            raise UnusableCase("too_slow", f"Expected pixels within {TIMEOUT_SECONDS} s.")
        reply = child.connection.recv_bytes()
    except (EOFError, OSError):
        if _stop(child) == -signal.SIGKILL:
            raise MemoryError("the decoder was killed") from None
        raise UnusableCase("unreadable", "Expected pixels, found bytes that crash the decoder.") from None
    except BaseException:
        _stop(child)
        raise
    if reply[:1] == b"P":
        return reply[1:]
    code, _, text = reply[1:].decode().partition("\n")
    raise UnusableCase(code, text)


def _warm() -> _Child:
    for child in list(_children):
        if child.parent == os.getpid() and child.process.poll() is None:
            return child
        _children.remove(child)  # it has died, or belongs to the process from which this one was forked
    ours, theirs = socket.socketpair()
    with theirs:
        command = (sys.executable, "-P", "-m", "client.decoder", str(theirs.fileno()))
        null = subprocess.DEVNULL
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=null, stdout=null, stderr=null)
    child = _Child(process=process, connection=Connection(ours.detach()), parent=os.getpid())
    if not _at_exit:
        _at_exit.append(atexit.register(_stop_all))
    _children.append(child)
    return child


def _stop_all() -> None:
    """Ends the warm child when its parent ends, which would else be said to have forgotten it."""
    for child in [one for one in _children if one.parent == os.getpid()]:
        _stop(child)


def _stop(child: _Child) -> int:
    """Ends a child that is of no more use; returns its exit status, negative if by a signal."""
    _children.remove(child)
    child.connection.close()
    try:
        return child.process.wait(timeout=PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        child.process.kill()
        return child.process.wait()


def serve(connection: Connection) -> None:
    """Answers one file after the other until the parent is gone; the child's whole life."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would hold the image
    from client import codecs  # heavy, and of use in this process only

    codecs.register()
    complaints = os.memfd_create("stderr")
    os.dup2(complaints, 2)
    while True:
        try:
            kind, content = connection.recv_bytes(), connection.recv_bytes()
        except EOFError:
            return
        reply = _answer(content, mask=kind == MASK)
        size = os.fstat(complaints).st_size
        heard = os.pread(complaints, size, 0)
        if any(complaint in heard for complaint in COMPLAINTS):
            reply = b"Eunreadable\nExpected sound data, found damage."
        os.ftruncate(complaints, 0)
        os.lseek(complaints, 0, os.SEEK_SET)
        connection.send_bytes(reply)


def _answer(content: bytes, *, mask: bool) -> bytes:
    from client import codecs, dicom, raster  # dicom imports this module

    try:
        if content.startswith(raster.JPEG_MAGIC):
            codecs.heard_of(content, **raster.stated(content))
            return b"P"
        stream = io.BytesIO()
        np.save(stream, _pixels(content, mask=mask), allow_pickle=False)
        return b"P" + stream.getvalue()
    except MemoryError:
        return b"Etoo_large\nExpected an image that fits into the decoder's memory."
    except UnusableCase as error:
        return f"E{error.code}\n{error}".encode()
    except Exception as error:  # the libraries raise anything on damaged bytes
        return f"E{dicom.code_of(error)}\nThe decoder ended with {type(error).__name__}.".encode()


def _pixels(content: bytes, *, mask: bool) -> np.ndarray:
    from client import dicom, raster

    if not dicom.is_dicom(content):
        return raster.pixels(content, mask=mask)
    with warnings.catch_warnings():
        # Sound run-length data ends with its last value.
        warnings.filterwarnings("error", "The decoded RLE segment contains non-conformant padding")
        return dicom.stored_pixels(dicom.parsed(content))


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
