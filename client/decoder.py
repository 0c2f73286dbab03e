"""Decompresses DICOM pixels in a process of its own.

The C and C++ libraries behind JPEG, JPEG-LS and JPEG 2000 crash, hang or ask for any amount of memory on
damaged files; that must cost one case and not the run. The process is started with the first compressed
file and ends with the process that started it. It never sees more than one file at a time.
"""

from __future__ import annotations

import io
import os
import resource
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np

from common.errors import UnusableCase

TIMEOUT_SECONDS = 120.0  # the largest images take a few seconds; this is for those that never end
PATIENCE_SECONDS = 5.0  # for a child whose connection was closed
MEMORY_BYTES = 2**33  # address space: libraries, and some copies of the largest image
COMPLAINT = b"Corrupt JPEG data"  # libjpeg says so on stderr, and then returns noise


@dataclass(frozen=True, kw_only=True)
class _Child:
    process: subprocess.Popen[bytes]
    connection: Connection
    parent: int


_children: list[_Child] = []  # the one that is warm, if any


def stored_pixels(content: bytes) -> np.ndarray:
    """Returns the stored values of a DICOM file of one frame, as ``images`` does for uncompressed ones.

    Raises:
        UnusableCase: no library decodes it, or the decoder crashed (``unreadable``) or did not end
            (``too_slow``).
        MemoryError: the decoder was killed, as the kernel does when memory runs out.
    """
    child = _warm()
    try:
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
        pixels: np.ndarray = np.load(io.BytesIO(reply[1:]), allow_pickle=False)
        return pixels
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
    _children.append(child)
    return child


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
    complaints = os.memfd_create("stderr")
    os.dup2(complaints, 2)
    while True:
        try:
            content = connection.recv_bytes()
        except EOFError:
            return
        reply = _answer(content)
        size = os.fstat(complaints).st_size
        if COMPLAINT in os.pread(complaints, size, 0):
            reply = b"Eunreadable\nExpected sound JPEG data, found damage."
        os.ftruncate(complaints, 0)
        os.lseek(complaints, 0, os.SEEK_SET)
        connection.send_bytes(reply)


def _answer(content: bytes) -> bytes:
    from client import images  # which imports this module

    try:
        stream = io.BytesIO()
        np.save(stream, images.stored_pixels(images.parsed(content)), allow_pickle=False)
        return b"P" + stream.getvalue()
    except MemoryError:
        return b"Etoo_large\nExpected an image that fits into the decoder's memory."
    except Exception as error:  # the libraries raise anything on damaged bytes
        return f"E{images.code_of(error)}\n{error}".encode()


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
