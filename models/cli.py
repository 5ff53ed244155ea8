"""Console script ``slicewise-models``: what is done with checkpoints outside the service."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from models.checkpoint import Manifest, Measured, load, locate
from models.ds_mbnet import DsMbnetConfig, imagenet14
from models.dsnet_import import import_dsnet
from models.export import export_subnet
from models.registry import ARCHITECTURES
from models.stages import parse_config
from models.training.commands import configure_train, run_train
from models.training.measure_commands import configure_evaluate, configure_plot, run_evaluate, run_plot
from models.training.seeded import create
from models.training.study_commands import configure_report, configure_study, run_report, run_study
from models.transform import FILTERS
from models.widening import widen


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand: its line in the help, its flags, and what it does."""

    help: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def _configure_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="IN.pth.tar", help="published checkpoint")
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="new version folder: ROOT/NAME/VERSION")
    parser.add_argument("--config", required=True, metavar="imagenet14|FILE.json", help="shape of the network")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="labels, one per line, in the logits' order")
    parser.add_argument("--ema", action="store_true", help="take the moving average of the weights")


def _import(arguments: argparse.Namespace) -> None:
    if arguments.config == "imagenet14":
        config = imagenet14()
    else:
        config = parse_config(DsMbnetConfig, json.loads(Path(arguments.config).read_text()), "ds_mbnet")
    classes = None
    if arguments.classes is not None:
        classes = tuple(arguments.classes.read_text(encoding="utf-8").splitlines())
    manifest = import_dsnet(arguments.source, arguments.out_dir, config, classes, use_ema=arguments.ema)
    print(f"{arguments.out_dir}: {len(manifest.slices)} slices, {len(manifest.classes)} classes, {manifest.digest}")


def _configure_create(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="new version folder: ROOT/NAME/VERSION")
    parser.add_argument("--architecture", choices=sorted(ARCHITECTURES), default="ds_mbnet")
    parser.add_argument("--config", required=True, metavar="imagenet14|FILE.json", help="shape of the network")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: 0)")
    parser.add_argument("--filter", choices=sorted(FILTERS), default="bicubic", help="to resize (default: bicubic)")


def _create(arguments: argparse.Namespace) -> None:
    if arguments.config == "imagenet14":
        config = asdict(imagenet14())
    else:
        config = json.loads(Path(arguments.config).read_text())
    manifest = create(arguments.out_dir, arguments.architecture, config, arguments.seed, arguments.filter)
    print(f"{arguments.out_dir}: {len(manifest.slices)} slices, seeded weights, {manifest.digest}")


def _configure_widen(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="PATH", help="version folder, or model folder (highest version)")
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="new version folder: ROOT/NAME/VERSION")
    parser.add_argument("--factor", type=int, required=True, help="how many times as many channels")


def _widen(arguments: argparse.Namespace) -> None:
    manifest = widen(arguments.out_dir, load(locate(arguments.path)), arguments.factor)
    costs = " to ".join(f"{manifest.slices[k].madds_served:,}" for k in (0, -1))
    print(f"{arguments.out_dir}: {len(manifest.slices)} slices, {costs} MAdds, the same answers, {manifest.digest}")


def _configure_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="PATH", help="version folder, or model folder (highest version)")
    parser.add_argument("--json", action="store_true", help="the manifest as JSON")


def _inspect(arguments: argparse.Namespace) -> None:
    manifest = load(locate(arguments.path)).manifest  # nothing is shown of a checkpoint that would not be served
    if arguments.json:
        print(json.dumps({"name": manifest.name, "version": manifest.version} | manifest.to_json(), indent=1))
    else:
        _print_manifest(manifest, Console(highlight=False, markup=False, soft_wrap=True))


def _print_manifest(manifest: Manifest, console: Console) -> None:
    spec, gate = manifest.input, manifest.gate
    console.print(f"{manifest.name}/{manifest.version}: {manifest.architecture}, {len(manifest.classes)} classes")
    console.print(f"input: {json.dumps(spec.to_json())}")
    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("width", "MAdds published", "MAdds served", "parameters"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("top-1", no_wrap=True)
    for record in manifest.slices:
        costs = (record.madds_published, record.madds_served, record.parameters)
        table.add_row(str(record.width), *(f"{cost:,}" for cost in costs), _named(record.accuracy, ".2%", "\n"))
    console.print(table)
    shares = gate.hold_out_shares
    console.print(f"gate choices: {', '.join(map(str, gate.choices))}")
    console.print(f"hold-out shares: {'not measured' if shares is None else ', '.join(f'{s:.1%}' for s in shares)}")
    console.print(f"gate top-1: {_named(gate.accuracy, '.2%')}")
    console.print(f"gate mean MAdds: {_named(gate.mean_madds, ',.0f')}")
    for index, point in enumerate(gate.operating_points):
        default = " (default)" if index == gate.default_point else ""
        console.print(
            f"operating point {index}{default}: lambda {point.lambda_:.4g}, {point.madds:,.0f} MAdds, "
            f"top-1 {point.accuracy:.2%}, shares {', '.join(f'{s:.1%}' for s in point.shares)}"
        )
    console.print(f"dataset: {json.dumps(manifest.dataset)}")
    console.print(f"recipe: {json.dumps(manifest.recipe)}")
    console.print(f"digest: {manifest.digest}")


def _named(measured: Iterable[Measured], form: str, separator: str = ", ") -> str:
    return separator.join(f"{m.value:{form}} ({m.split}, {m.count:,})" for m in measured) or "not measured"


def _configure_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="PATH", help="version folder, or model folder (highest version)")
    parser.add_argument("--width", type=int, required=True, help="ladder index, 0 = narrowest")
    parser.add_argument("--format", choices=["onnx"], default="onnx")
    parser.add_argument("out", type=Path, metavar="OUT", help="file to write")


def _export(arguments: argparse.Namespace) -> None:
    graph = export_subnet(load(locate(arguments.path)).net, arguments.width)
    arguments.out.write_bytes(graph)
    print(f"{arguments.out}: {len(graph):,} bytes, pixels [N, 3, H, W] -> logits [N, K]")


COMMANDS = {
    "train": Command("both training stages of a recipe -> a checkpoint", configure_train, run_train),
    "evaluate": Command("accuracy of every slice and of the gate on labelled images", configure_evaluate, run_evaluate),
    "plot": Command("figures of evaluations: accuracy against MAdds, widths, examples", configure_plot, run_plot),
    "study": Command("arms that differ in what the narrower widths learn from", configure_study, run_study),
    "report": Command("a checkpoint, its gate and the arms of a study as one report", configure_report, run_report),
    "create": Command("seeded weights, to measure a shape before it is trained", _configure_create, _create),
    "widen": Command("a DS-ResNet with more channels and the same answers", _configure_widen, _widen),
    "import-dsnet": Command("a published DS-Net .pth.tar -> a checkpoint", _configure_import, _import),
    "inspect": Command("what a checkpoint holds, costs and was measured to do", _configure_inspect, _inspect),
    "export": Command("one slice as one graph for another runtime", _configure_export, _export),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; 1 with one line on stderr when a file or a value is bad."""
    parser = argparse.ArgumentParser(prog="slicewise-models", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.help, description=command.help)
        command.configure(subparser)
        subparser.set_defaults(run=command.run)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, OSError, FloatingPointError) as error:  # a CheckpointError is a ValueError
        print(f"slicewise-models: error: {error}", file=sys.stderr)
        return 1
    return 0
