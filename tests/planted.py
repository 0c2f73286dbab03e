"""A site full of names: in every text tag of DICOM, in headers of other formats, in paths and in the table.

Each place has a word of its own, so that what is found elsewhere says where it came from.
"""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import yaml
from PIL import Image as Pillow
from PIL.PngImagePlugin import PngInfo
from pydicom.datadict import DicomDictionary, keyword_for_tag
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import RLELossless

from client import dicom
from client.site import Site, open_site
from simulations import dicom_file
from simulations.anatomy import Difficulty, random_anatomy
from simulations.phantom import draw, random_scanner
from tests.sites import write_site

NUMBER, DATE, TIME = "4711081517", "19470811", "081517.4711"
HEADERS: Mapping[str, str] = {
    "tag": "Wolkenstein",
    "private tag": "Hadlaub",
    "nested tag": "Zweter",
    "needed tag": "Frauenlob",
    "NIfTI": "Toggenburg",
    "PNG": "Morungen",
    "JPEG": "Rotenburg",
    "TIFF": "Johansdorf",
    "broken file": "Hausenberg",
}
LISTED: Mapping[str, str] = {
    "file": "Vogelweide",
    "folder": "Reuental",
    "patient": "Eschenbach",
    "cell": "Ofterdingen",
    "label": "Tannhauser",
    "long row": "Gottfried",
}
WORDS: Mapping[str, str] = {**HEADERS, **LISTED, "number": NUMBER, "date": DATE, "time": TIME}
TEXTS: Mapping[str, str] = {
    **dict.fromkeys(("AE", "CS", "SH"), "WOLKENSTEIN"),
    **dict.fromkeys(("LO", "LT", "ST", "UC", "UT"), "Wolkenstein, Oswald"),
    **dict.fromkeys(("DS", "IS"), NUMBER),
    **{"PN": "Wolkenstein^Oswald", "DA": DATE, "TM": TIME, "DT": f"{DATE}{TIME}"},
    **{"UI": f"1.2.{NUMBER}", "UR": "https://wolkenstein.example", "AS": "081Y"},
}
KEPT = {*dicom.NEEDED, "SpecificCharacterSet"}
SIZE = 32


def plant(directory: Path, *, name: str = "north", num_patients: int = 12) -> Site:
    """Makes a site with sound files of every format and broken ones, all of them with names."""
    write_site(directory, name=name, size=SIZE, num_patients=num_patients, max_epsilon=1000.0)
    settings = yaml.safe_load((directory / "site.yaml").read_text())
    settings["rules"]["max_quarantined_fraction"] = 1.0
    (directory / "site.yaml").write_text(yaml.safe_dump(settings))
    folder = directory / "images" / f"{LISTED['folder']}^Neidhart"
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, of what is planted
        sound = [*_dicom(folder), *_others(folder)]
        broken = _broken(folder, sound)
    rows = [(path, "normal", f"{LISTED['patient']} {number}", "") for number, path in enumerate(sound)]
    rows += [(path, "opacity", f"{LISTED['patient']} B", "") for path in broken]
    rows += [(folder / f"{LISTED['file']}-lost.dcm", "normal", f"{LISTED['patient']} L", "")]
    mislabelled = folder / "other.png"
    _write_png(mislabelled, value=9)
    rows += [(mislabelled, LISTED["label"], "Patient 1", LISTED["cell"])]
    _list(directory / "cases.csv", rows)
    return open_site(directory)


def _list(table: Path, rows: Iterable[tuple[Path, str, str, str]]) -> None:
    """Adds rows, and a column that nobody asked for; the last row is longer than the header."""
    lines = list(csv.reader(table.read_text().splitlines()))
    with table.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow([*lines[0], "remark"])
        writer.writerows([*line, LISTED["cell"]] for line in lines[1:])
        writer.writerows((path.relative_to(table.parent), *others) for path, *others in rows)
        writer.writerow([f"images/{LISTED['long row']}.png", "normal", LISTED["long row"], "", "", ""])


def _dicom(folder: Path) -> list[Path]:
    rng = np.random.default_rng(1)
    paths = []
    for number in range(3):
        scanner = random_scanner(rng, index=number, image_size=64)
        image = draw(random_anatomy(rng, diseased=number == 1, difficulty=Difficulty()), scanner, rng)
        path = folder / f"{LISTED['file']}-{number}.dcm"
        dicom_file.write(path, image, scanner=scanner, patient_id=NUMBER, study="s", instance=number + 1)
        dataset = pydicom.dcmread(path)
        name_all(dataset)
        if number == 2:
            dataset.compress(RLELossless, generate_instance_uid=False)  # decoded in a process of its own
        dataset.save_as(path)
        paths.append(path)
    return paths


def name_all(dataset: Dataset) -> None:
    """Writes names into every text tag of the standard, private and nested ones, and the preamble."""
    with pydicom.config.disable_value_validation():
        for tag, (vr, *_) in DicomDictionary.items():
            if vr in TEXTS and tag >> 16 > 2 and keyword_for_tag(tag) not in KEPT:
                dataset.add_new(tag, vr, TEXTS[vr])
        dataset.SpecificCharacterSet = "ISO_IR 192"
        block = dataset.private_block(0x0011, HEADERS["private tag"], create=True)
        block.add_new(0x01, "LO", HEADERS["private tag"])
        block.add_new(0x02, "UN", HEADERS["private tag"].encode())
        item = Dataset()
        item.PatientName = HEADERS["nested tag"]
        dataset.RequestAttributesSequence = Items([item])
        dataset.ImageType = ["ORIGINAL", "PRIMARY", HEADERS["needed tag"].upper()]
        dataset.SeriesInstanceUID = f"1.2.{NUMBER}"
    dataset.preamble = HEADERS["tag"].encode().ljust(128, b"\0")


def _others(folder: Path) -> list[Path]:
    pixels = np.random.default_rng(2).integers(0, 256, (SIZE, SIZE), dtype=np.uint8)
    paths = [folder / f"{LISTED['file']}.{kind}" for kind in ("nii", "png", "jpg", "tif")]
    _write_nifti(paths[0], pixels)
    _write_png(paths[1], value=0)
    exif = Pillow.Exif()
    exif[0x010E] = exif[0x013B] = exif[0x9C9B] = HEADERS["JPEG"]
    Pillow.fromarray(pixels + 1).save(paths[2], exif=exif, comment=HEADERS["JPEG"], quality=95)
    Pillow.fromarray(pixels + 2).save(paths[3], tiffinfo={270: HEADERS["TIFF"], 315: HEADERS["TIFF"]})
    return paths


def _write_png(path: Path, *, value: int) -> None:
    text = PngInfo()
    text.add_text("Author", HEADERS["PNG"])
    text.add_itxt("Title", HEADERS["PNG"], tkey=HEADERS["PNG"])
    pixels = np.random.default_rng(value).integers(0, 256, (SIZE, SIZE), dtype=np.uint8)
    Pillow.fromarray(pixels).save(path, pnginfo=text)


def _write_nifti(path: Path, pixels: np.ndarray) -> None:
    image = nibabel.Nifti1Image(pixels[:, :, None], np.diag([1.5, 1.5, 3, 1]))
    for field in ("descrip", "db_name", "aux_file", "intent_name"):
        image.header[field] = HEADERS["NIfTI"].encode()
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", HEADERS["NIfTI"].encode()))
    image.to_filename(path)


def _broken(folder: Path, sound: list[Path]) -> list[Path]:
    """Files that end in the middle, that hold something else, and whose header says names where it counts."""
    paths = []
    for path in sound:
        cut = folder / f"{LISTED['file']}-cut{path.suffix}{len(paths)}"
        content = path.read_bytes()
        cut.write_bytes(content[: len(content) - min(len(content) // 3, 1500)])
        paths.append(cut)
    other = folder / f"{LISTED['file']}-text.dcm"
    other.write_bytes(HEADERS["broken file"].encode() * 40)
    return [*paths, other, *_badly_tagged(folder, sound[0])]


def _badly_tagged(folder: Path, sound: Path) -> list[Path]:
    word = HEADERS["broken file"]
    changes = {
        "PhotometricInterpretation": word.upper(),
        "SpecificCharacterSet": word,
        "RescaleSlope": word,
        "WindowCenter": word,
        "Rows": None,
        "VOILUTFunction": word,
    }
    paths = []
    for keyword, value in changes.items():
        with pydicom.config.disable_value_validation():
            dataset = pydicom.dcmread(sound)
            _set(dataset, keyword, value)
            paths.append(folder / f"{LISTED['file']}-{keyword}.dcm")
            dataset.save_as(paths[-1])
    return paths


def _set(dataset: Dataset, keyword: str, value: str | None) -> None:
    if value is None:
        del dataset[keyword]
    elif keyword in ("RescaleSlope", "WindowCenter"):
        dataset[keyword] = pydicom.DataElement(keyword, "LO", value)
    else:
        setattr(dataset, keyword, value)


def found(content: bytes, words: Iterable[str] = WORDS.values()) -> set[str]:
    """Returns the words that are in some bytes, in any usual spelling and encoding."""
    low = content.lower()
    encoded = ((word, word.lower().encode(encoding)) for word in words for encoding in ENCODINGS)
    return {word for word, form in encoded if form in low}


ENCODINGS = ("utf-8", "utf-16-le", "utf-16-be")
