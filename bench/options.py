"""Options that every command has: where it runs."""

from __future__ import annotations

import argparse

import torch


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add ``--device`` and ``--threads``."""
    parser.add_argument("--device", type=torch.device, help="cpu, cuda, cuda:1 ... (default: CUDA where there is one)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")


def device_of(options: argparse.Namespace) -> torch.device:
    """The device asked for, the CPU threads set.

    Raises:
        ValueError: fewer than one thread.
    """
    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"--threads: expected 1 or more, got {options.threads}")
        torch.set_num_threads(options.threads)
    return options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
