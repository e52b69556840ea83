"""Volumes as bytes: what NumPy writes is read; what is no volume is refused, before memory is set aside."""

import io
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from synmlops.serving.wire import from_npy, to_npy


def a_volume(dtype: type = np.uint8) -> NDArray[Any]:
    return np.random.default_rng(7).integers(0, 256, (9, 45, 51)).astype(dtype)


@pytest.mark.parametrize(
    "array",
    [
        a_volume(),
        a_volume(dtype=np.uint16) * 257,
        np.asfortranarray(a_volume()),
        a_volume(dtype=np.uint16).astype(">u2"),
        a_volume()[:, ::2, ::-1],
    ],
)
def test_any_reader_and_writer_of_npy_agrees(array: NDArray[Any]) -> None:
    file = io.BytesIO()
    np.save(file, array)
    read = from_npy(file.getvalue(), ndim=3)
    assert np.array_equal(read, array)
    assert read.dtype.isnative
    assert read.flags.writeable
    if array.dtype.isnative:
        assert np.array_equal(np.load(io.BytesIO(to_npy(array)), allow_pickle=False), array)


def saved(array: Any, **more: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **more)
    return file.getvalue()


def claims_a_terabyte() -> bytes:
    file = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": (10_000, 10_000, 10_000)}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + b"123"


def zipped() -> bytes:
    file = io.BytesIO()
    np.savez(file, a_volume())
    return file.getvalue()


BAD_BYTES = {
    "text": (b"hello", "not the bytes of a .npy"),
    "nothing": (b"", "not the bytes of a .npy"),
    "npz": (zipped(), "not the bytes of a .npy"),
    "cut short": (saved(a_volume())[:-1], "should fill"),
    "too long": (saved(a_volume()) + b"0", "should fill"),
    "claims a terabyte": (claims_a_terabyte(), "1000000000000 bytes"),
    "float": (saved(a_volume().astype(np.float32)), "float32; send uint8 or uint16"),
    "signed": (saved(a_volume().astype(np.int8)), "int8; send uint8 or uint16"),
    "objects": (saved(np.array([[[None]]], object), allow_pickle=True), "object; send uint8"),
    "one section": (saved(a_volume()[0]), r"2 axes \(45 x 51\); 3"),
    "a number": (saved(np.uint8(3)), "0 axes"),
    "empty": (saved(a_volume()[:0]), r"no voxels \(0 x 45 x 51\)"),
}


@pytest.mark.parametrize("name", BAD_BYTES)
def test_bytes_that_are_no_volume_are_refused(name: str) -> None:
    raw, message = BAD_BYTES[name]
    with pytest.raises(ValueError, match=message):
        from_npy(raw, ndim=3)


def test_only_unsigned_8_and_16_bit_are_sent() -> None:
    with pytest.raises(ValueError, match="float64"):
        to_npy(np.zeros((1, 1, 1)))
