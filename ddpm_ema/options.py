"""Options of the commands that take no settings: apart from their modules, so that `--help` does not wait for torch."""

import argparse
import re
from pathlib import Path


def report() -> argparse.ArgumentParser:
    """Options of `ddpm-ema report`."""
    parser = argparse.ArgumentParser(
        prog="ddpm-ema report", description="Writes report.html for a run, or for several side by side."
    )
    parser.add_argument("runs", type=Path, nargs="+", help="run directories, such as runs/digits")
    parser.add_argument(
        "--output",
        type=Path,
        help="the file to write (default: RUN/report.html, or comparison.html beside several)",
    )
    parser.add_argument(
        "--scoring",
        help="folder name or digest of the scoring that answers (default: the newest that compares raw with an average)",
    )
    return parser


def export() -> argparse.ArgumentParser:
    """Options of `ddpm-ema export`."""
    parser = argparse.ArgumentParser(
        prog="ddpm-ema export",
        description="Writes weights of a run as a diffusers pipeline folder with a model card.",
    )
    parser.add_argument("run", type=Path, help="the run directory, such as runs/digits")
    parser.add_argument("name", help="raw, an average, a profile to reconstruct such as power_0_075, or NAME@STEP")
    parser.add_argument("--output", type=Path, help="the folder to write (default: RUN/export/NAME)")
    parser.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")
    parser.add_argument("--variant", action="store_true", help="store the weights as diffusers' variant=NAME")
    parser.add_argument("--model.factory", dest="factory", help="the run's own, if you trust the code that it names")
    return parser


def reconstruct() -> argparse.ArgumentParser:
    """Options of `ddpm-ema reconstruct`."""
    parser = argparse.ArgumentParser(
        prog="ddpm-ema reconstruct",
        description="Reconstructs averages that were not kept from the snapshots of a run. --plan says before a run what to store.",
    )
    parser.add_argument("run", type=Path, nargs="?", help="the run directory, such as runs/digits")
    parser.add_argument(
        "--target",
        action="append",
        default=[],
        help="a name (power_0_075, bias_corrected_0_9999, uniform) or its fields (power_function:std=0.075); may be repeated",
    )
    parser.add_argument("--step", type=int, help="step of the average (default: the last snapshot's)")
    parser.add_argument("--out", type=Path, help="folder of the files (default: RUN/reconstructed/step-N)")
    parser.add_argument(
        "--plan", action="store_true", help="print which averages to store, how often, and what they give"
    )
    parser.add_argument("--steps", type=_amount, help="--plan: steps of the run (default: --config's)")
    parser.add_argument("--config", type=Path, help="--plan: settings, for the learning rates")
    parser.add_argument("--budget", type=_amount, default=20e9, help="--plan: bytes for snapshots (default: 20GB)")
    parser.add_argument("--parameters", type=_amount, default=35.7e6, help="--plan: of the model (default: 35.7M)")
    return parser


def importing() -> argparse.ArgumentParser:
    """Options of `ddpm-ema import`."""
    parser = argparse.ArgumentParser(
        prog="ddpm-ema import",
        description="Makes a run directory from the checkpoints of another program, to average, score, sweep and export.",
    )
    parser.add_argument(
        "source", type=Path, help="output folder of diffusers' train_unconditional.py, or folder of files"
    )
    parser.add_argument("--output-dir", type=Path, required=True, help="the run directory to write")
    parser.add_argument(
        "--pattern", action="append", default=[], help="file names, such as step_{step}.safetensors; may be repeated"
    )
    parser.add_argument(
        "--profile", action="append", default=[], help="how they were averaged (constant:decay=0.999; default: raw)"
    )
    parser.add_argument(
        "--prefix", action="append", default=[], help="prefix of the tensors to take, such as ema_model."
    )
    parser.add_argument(
        "--key", action="append", default=[], help="where a torch file holds its state dict (default: state_dict)"
    )
    parser.add_argument("--unet", type=Path, help="config.json of the UNet2DModel that the files belong to")
    parser.add_argument(
        "--config", type=Path, help="settings (YAML): the data, and what SOURCE does not say of the network"
    )
    parser.add_argument(
        "--checkpoints", type=int, default=1, help="number of newest steps that can be scored (default: 1)"
    )
    return parser


def _amount(text: str) -> float:
    """20GB, 35.7M, 800k -> a number."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([kMGT]?)B?", text)
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 20GB, 35.7M or 800000")
    return float(match[1]) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[match[2]]
