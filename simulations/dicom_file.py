"""The DICOM file that a scanner would have written of a phantom."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    generate_uid,
)

from simulations.phantom import Pixels, Scanner


def write(
    path: Path,
    pixels: Pixels,
    *,
    scanner: Scanner,
    patient_id: str,
    study: str,
    instance: int,
) -> None:
    """Writes stored values as the DICOM file that ``scanner`` would have written.

    Args:
        path: the new file.
        pixels: stored values, uint16, (rows, columns), as ``draw`` returns them.
        scanner: the device.
        patient_id: the hospital's number of the patient.
        study: any text that differs between studies; all UIDs follow from it and ``instance``.
        instance: the number of the image in its series, from 1.
    """
    meta = FileMetaDataset()
    is_dx = scanner.modality == "DX"
    meta.MediaStorageSOPClassUID = (
        DigitalXRayImageStorageForPresentation if is_dx else ComputedRadiographyImageStorage
    )
    meta.MediaStorageSOPInstanceUID = _uid(study, "instance", instance)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    file.SOPClassUID = meta.MediaStorageSOPClassUID
    file.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    _describe_study(file, patient_id=patient_id, study=study, instance=instance, scanner=scanner)
    _describe_pixels(file, pixels, scanner=scanner)
    file.save_as(path, enforce_file_format=True)


def _uid(*parts: object) -> str:
    """A UID that is the same for the same parts."""
    return str(generate_uid(entropy_srcs=["feverfew phantom", *map(str, parts)]))


def _describe_study(
    file: FileDataset, *, patient_id: str, study: str, instance: int, scanner: Scanner
) -> None:
    file.PatientID = patient_id
    file.PatientName = f"Phantom^{patient_id}"
    file.PatientBirthDate = ""
    file.PatientSex = ""
    file.StudyInstanceUID = _uid(study, "study")
    file.SeriesInstanceUID = _uid(study, "series")
    file.FrameOfReferenceUID = _uid(study, "frame")
    file.StudyID = _uid(study, "study")[-8:]
    file.AccessionNumber = _uid(study, "accession")[-12:]
    file.StudyDate = file.SeriesDate = file.ContentDate = file.AcquisitionDate = "20240101"
    file.StudyTime = file.SeriesTime = file.ContentTime = file.AcquisitionTime = "080000"
    file.ReferringPhysicianName = ""
    file.Modality = scanner.modality
    file.Manufacturer = "Feverfew phantoms"
    file.ManufacturerModelName = scanner.model
    file.StudyDescription = "Chest PA"
    file.SeriesNumber = 1
    file.InstanceNumber = instance
    file.ImageType = ["DERIVED", "PRIMARY", ""]
    file.BodyPartExamined = "CHEST"
    file.ViewPosition = "PA"
    file.PatientOrientation = ["L", "F"]
    file.ImageLaterality = "U"
    file.BurnedInAnnotation = "NO"


def _describe_pixels(file: FileDataset, pixels: Pixels, *, scanner: Scanner) -> None:
    """Pixel data, and the window that the device chose for this image."""
    low, high = np.percentile(pixels, (0.5, 99.5)) * scanner.rescale_slope + scanner.rescale_intercept
    file.SamplesPerPixel = 1
    file.PhotometricInterpretation = scanner.photometric
    file.Rows, file.Columns = pixels.shape
    file.BitsAllocated = 8 if scanner.bits_stored == 8 else 16
    file.BitsStored = scanner.bits_stored
    file.HighBit = scanner.bits_stored - 1
    file.PixelRepresentation = 0
    file.PixelSpacing = file.ImagerPixelSpacing = [scanner.pixel_mm, scanner.pixel_mm]
    file.RescaleSlope, file.RescaleIntercept, file.RescaleType = (
        scanner.rescale_slope,
        scanner.rescale_intercept,
        "US",
    )
    file.WindowCenter, file.WindowWidth = round((low + high) / 2, 1), round(max(high - low, 2.0), 1)
    file.VOILUTFunction = "LINEAR"
    file.PresentationLUTShape = "INVERSE" if scanner.photometric == "MONOCHROME1" else "IDENTITY"
    file.PixelIntensityRelationship, file.PixelIntensityRelationshipSign = "LOG", 1
    file.LossyImageCompression = "00"
    file.PixelData = pixels.astype("<u1" if scanner.bits_stored == 8 else "<u2").tobytes()
