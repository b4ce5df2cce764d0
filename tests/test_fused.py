"""Building the C++ of the attention: what can go wrong costs speed, and nothing else."""

import multiprocessing
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import close

import fused
import kernels
from groundwork.files import temporary_path

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, where nothing is built yet."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    forget()
    yield tmp_path / "cache"
    forget()


def forget():
    """What this process knows of the library, as if it began."""
    fused.library.cache_clear()
    fused.build.cache_clear()


def check_energies():
    projected, query, w = torch.randn(3, 5, 12), torch.randn(6, 12), torch.randn(12)
    images = torch.tensor([2, 0, 2, 2, 0, 2])
    for activation in (torch.relu, torch.tanh):
        found = kernels.Energies(projected, w, activation)(query, images)
        close(found, kernels.plain_energies(projected, query, w, images, activation))


@needs_compiler
def test_it_is_built_once(cache, capsys, monkeypatch):
    check_energies()
    assert not cache.exists()  # without being asked for it
    fused.build(CPU)
    assert capsys.readouterr().out == "" and fused.runs(torch.ones(1, 1, 1))
    check_energies()
    [file] = fused.library_path().parent.iterdir()
    forget()
    monkeypatch.setenv("PATH", "")  # and now no compiler is needed
    fused.build(CPU)
    assert capsys.readouterr().out == "" and fused.runs(torch.ones(1, 1, 1))
    assert not fused.runs(torch.ones(1, 1, 1, dtype=torch.float64))
    assert [file] == [*fused.library_path().parent.iterdir()]


def test_a_gpu_has_nothing_built(cache):
    fused.build(torch.device("cuda"))
    assert not cache.exists()


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


FAULTS = {  # what the compiler does, and what is said of it
    "absent": (None, "there is no compiler /"),
    "refuses": ("echo 'x.cpp:3: error: no such thing' >&2; exit 1", "error: no such thing"),
    "silent": ("exit 3", "exit status 3"),
    "writes nothing": ("exit 0", "cannot write"),
    "writes something else": ('for last; do :; done; echo x > "$last"', "file too short"),
    "makes another library": (
        'for last; do :; done; echo "int x;" | c++ -x c++ - -shared -o "$last"',
        "undefined symbol",
    ),
}


def test_a_compiler_that_is_no_command_is_none(cache, capsys, monkeypatch):
    monkeypatch.setenv("CXX", "g++ '")
    fused.build(CPU)
    [line] = capsys.readouterr().out.splitlines()
    assert "No closing quotation" in line and not fused.runs(torch.ones(1, 1, 1))


@needs_compiler
@pytest.mark.parametrize("fault", FAULTS)
def test_without_a_compiler_of_use_one_line_says_so(cache, capsys, monkeypatch, tmp_path, fault):
    does, says = FAULTS[fault]
    compiler = tmp_path / "c++"
    monkeypatch.setenv("CXX", str(script(compiler, does) if does else compiler))
    fused.build(CPU)
    fused.build(CPU)
    [line] = capsys.readouterr().out.splitlines()
    assert says in line and "fused.cpp is not built" in line
    assert not fused.runs(torch.ones(1, 1, 1))
    check_energies()


def test_a_cache_that_cannot_be_written_is_named(cache, capsys):
    cache.write_text("no folder")
    fused.build(CPU)
    [line] = capsys.readouterr().out.splitlines()
    assert f"cannot make the folder {cache}" in line
    check_energies()


@needs_compiler
def test_what_an_interrupted_build_has_left_is_mended(cache, capsys):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    path = fused.library_path()
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\x7fELF")
    left = temporary_path(path)
    left = left.with_name(left.name.replace(f".{os.getpid()}.", f".{ended.pid}."))
    left.write_bytes(b"\x7fELF")
    check_energies()
    fused.build(CPU)
    assert capsys.readouterr().out == "" and fused.library() is not None
    assert [*path.parent.iterdir()] == [path]


def _build(barrier):
    barrier.wait()
    fused.build(CPU)
    check_energies()
    assert fused.library() is not None


@pytest.mark.slow
@needs_compiler
def test_processes_build_at_once(cache):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    processes = [context.Process(target=_build, args=(barrier,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert [*fused.library_path().parent.iterdir()] == [fused.library_path()]
    check_energies()
    assert fused.library() is not None
