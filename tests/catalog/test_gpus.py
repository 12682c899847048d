"""The catalogue of GPUs: every entry complete and cited, every name findable."""

from __future__ import annotations

import json
import re
from importlib import resources

import pytest
from hypothesis import given, strategies as st

from planner.catalog.gpus import Gpu, gpu, gpus, multiprocessors, multiprocessors_of
from planner.errors import SetupError
from planner.units import GIB, MIB

# https://developer.nvidia.com/cuda-gpus and /cuda-legacy-gpus, by the word that marks the generation
CAPABILITIES = {"H100": (9, 0), "B200": (10, 0), "A100": (8, 0), "V100": (7, 0), "P100": (6, 0), "T4": (7, 5)}


def test_there_are_enough_and_no_two_share_a_name() -> None:
    assert len(gpus()) >= 55
    assert len({item.name for item in gpus()}) == len(gpus())
    sizes = {(item.driver_name, item.total_bytes) for item in gpus()}
    assert len(sizes) == len(gpus())


@pytest.mark.parametrize("item", gpus(), ids=lambda item: item.name)
def test_an_entry_is_complete(item: Gpu) -> None:
    assert item.source.startswith("https://")
    assert item.memory_kind in ("torch", "driver", "nominal")
    assert item.nominal == (item.memory_kind == "nominal")
    assert 4 * GIB < item.total_bytes < 300 * GIB
    assert item.capability is not None
    assert (5, 0) < item.capability <= (12, 1)
    if item.nominal:
        assert item.total_bytes % GIB == 0
    assert gpu(item.name) is item
    for word, capability in CAPABILITIES.items():
        if word in item.driver_name.split() + item.driver_name.split("-"):
            assert item.capability == capability


@pytest.mark.parametrize("item", gpus(), ids=lambda item: item.name)
def test_multiprocessors_are_cited_or_not_given(item: Gpu) -> None:
    if item.multiprocessors is None:
        assert item.multiprocessors_source == ""
        assert multiprocessors(item) == 108
    else:
        address, _, said = item.multiprocessors_source.partition(" (")
        assert address.startswith("https://")
        assert str(item.multiprocessors) in re.findall(r"\d+", said)
        assert 0 < item.multiprocessors < 200


def test_reported_sizes_are_what_the_cited_reports_say() -> None:
    # torch.cuda.get_device_properties / deviceQuery / nvidia-smi outputs quoted in each entry's source
    reported = {
        "Tesla T4": 14912 * MIB,
        "NVIDIA H200": 143156 * MIB,
        "NVIDIA L4": 23570219008,
        "NVIDIA A100-SXM4-80GB": 81051 * MIB,
        "NVIDIA A100-SXM4-40GB": 42298834944,
        "NVIDIA H100 80GB HBM3": 85045477376,
        "NVIDIA GeForce RTX 4090": 25386352640,
        "NVIDIA GeForce RTX 3090": 25327697920,
        "NVIDIA RTX 6000 Ada Generation": 51002867712,
    }
    for driver_name, total_bytes in reported.items():
        found = gpu(driver_name)
        assert (found.total_bytes, found.memory_kind) == (total_bytes, "torch")


def test_multiprocessors_are_those_that_cards_report() -> None:
    # torch.cuda.get_device_properties, deviceQuery, OpenCL and hashcat outputs: each multiprocessors_source
    reported = {"a10": 72, "a10g": 80, "a40": 84, "a100-40gb": 108, "b200": 148, "h100": 132, "h20": 78}
    reported |= {"gh200": 132, "l4": 58, "l40s": 142, "rtx-5090": 170}
    for name, count in reported.items():
        assert multiprocessors(gpu(name)) == count
    assert all(item.multiprocessors for item in gpus())
    assert multiprocessors(None) == multiprocessors(gpu("24GiB")) == 108  # an A100's where none are known
    assert multiprocessors_of("NVIDIA H200") == 132
    assert multiprocessors_of("Another card") is None


def test_a_report_is_below_the_product_size_and_not_far_below() -> None:
    products = {"rtx-3060": 12, "rtx-3080": 10, "rtx-4090": 24, "rtx-5090": 32, "a100-80gb": 80, "h100": 80}
    products |= {"v100-16gb": 16, "a40": 48, "l40s": 48, "rtx-a6000": 48, "rtx-5070": 12, "gh200": 96}
    for name, size_gib in products.items():
        assert 0.91 < gpu(name).total_bytes / (size_gib * GIB) < 1.0, name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("t4", "t4"),
        ("TESLA T4", "t4"),
        ("RTX 4090", "rtx-4090"),
        ("rtx4090", "rtx-4090"),
        ("4070 ti super", "rtx-4070-ti-super"),
        ("nvidia geforce rtx 4070 laptop gpu", "rtx-4070-laptop"),
        ("A100-SXM4-80GB", "a100-80gb"),
        ("RTX 6000 Ada", "rtx-6000-ada"),
        ("Quadro RTX 6000", "quadro-rtx-6000"),
    ],
)
def test_names_are_found_however_they_are_written(text: str, name: str) -> None:
    assert gpu(text).name == name


def test_every_driver_name_is_found_or_asks_for_the_size() -> None:
    for item in gpus():
        same = [other for other in gpus() if other.driver_name == item.driver_name]
        if len(same) == 1:
            assert gpu(item.driver_name) is item
        else:
            with pytest.raises(SetupError, match="more than one memory size; write .*" + item.name):
                gpu(item.driver_name)


def test_a_size_is_a_gpu_of_unknown_capability() -> None:
    found = gpu("24 GiB")
    assert (found.total_bytes, found.capability, found.memory_kind) == (24 * GIB, None, "asked")
    assert gpu(found.name) == found
    assert gpu("16GB").total_bytes == 16 * 10**9
    assert not found.nominal


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rtx 4091", "did you mean rtx-4090"),
        ("a100", "did you mean a100-40gb, a100-40gb-pcie, a100-80gb"),
        ("v100", "did you mean v100-16gb, v100-32gb"),
        ("", "allowed:"),
        ("NVIDIA", "allowed:"),
        ("0GiB", "positive number"),
        ("-8 GiB", "positive number"),
        ("nan GiB", "unknown GPU"),
        ("x" * 1000, "at most 100 characters"),
    ],
)
def test_nonsense_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(SetupError, match=message) as caught:
        gpu(text)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=120))
def test_any_text_gives_a_gpu_or_a_setup_error(text: str) -> None:
    try:
        found = gpu(text)
    except SetupError as error:
        message = str(error)
    else:
        message = found.name
        assert found.total_bytes > 0
    assert "\n" not in message


def test_the_file_says_what_its_numbers_mean() -> None:
    text = resources.files("planner.catalog").joinpath("gpus.json").read_text(encoding="utf-8")
    data = json.loads(text)
    assert "totalGlobalMem" in data["note"]
    assert "https://developer.nvidia.com/cuda-gpus" in data["capability_source"]
    assert "multiProcessorCount" in data["multiprocessors_note"]
