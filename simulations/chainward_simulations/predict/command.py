"""`chainward predict`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from chainward_server.cli import DEFAULT_DIR, RunsDir, errors
from chainward_server.report.formats import score

if TYPE_CHECKING:
    from chainward_simulations.predict.answers import Predictions

Model = Annotated[
    Path,
    typer.Argument(
        help="Id or folder of a run, an exported folder, a .safetensors or an .onnx file.", show_default=False
    ),
]
Inputs = Annotated[
    list[Path],
    typer.Argument(help="Pictures and DICOM files, folders of them, CSV lists; or one data.yaml.", show_default=False),
]
ModelName = Annotated[
    Literal["student", "chain"] | None,
    typer.Option("--model", help="Which model of a run. Default: as for export."),
]
Csv = Annotated[Path | None, typer.Option("--csv", help="Write a CSV table there. Default: print it.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write JSON there, with all that is known.")]
StructuredReports = Annotated[
    Path | None,
    typer.Option(help="Write DICOM Structured Reports into this folder (extra `report`); DICOM inputs only."),
]
HeatMaps = Annotated[
    Path | None,
    typer.Option(help="Write where the model looks into this folder: PNG; of DICOM inputs secondary captures."),
]
AbstainBelow = Annotated[
    float, typer.Option(min=0, max=1, help="Abstain where the probability of the answer is lower.")
]
AbstainBeyond = Annotated[
    float,
    typer.Option(
        min=0,
        help="Abstain where an image is further from the training images, in times what is usual; only models with heads from "
        "statistics can tell.",
    ),
]
Split = Annotated[
    Literal["train", "val", "test"] | None, typer.Option(help="Of a data.yaml with splits: only these images.")
]
Fit = Annotated[
    Literal["pad", "crop", "stretch"] | None,
    typer.Option(help="How images are made square, instead of as in training."),
]
GreyScale = Annotated[
    tuple[float, float] | None, typer.Option(help="Values shown black and white in grey of more than 8 bits.")
]


def predict(
    model: Model,
    inputs: Inputs,
    directory: RunsDir = DEFAULT_DIR,
    name: ModelName = None,
    to_csv: Csv = None,
    to_json: Json = None,
    sr: StructuredReports = None,
    heatmap: HeatMaps = None,
    abstain_below: AbstainBelow = 0.5,
    abstain_beyond: AbstainBeyond = 3.0,
    split: Split = None,
    column: Annotated[str | None, typer.Option(help="Column of a CSV list with the files' names.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the files that a CSV list names.")] = None,
    site: Annotated[str | None, typer.Option(help="Prepare images as this one of the training sites did.")] = None,
    fit: Fit = None,
    scale: GreyScale = None,
) -> None:
    """Apply a model to images, prepared as for its training. 0: all predicted, 1: some images could not be used, 2: bad input."""
    from chainward_server.watch import find_run
    from chainward_simulations.predict.answers import Abstain, write
    from chainward_simulations.predict.inputs import Problem, open_inputs
    from chainward_simulations.predict.models import open_model
    from chainward_simulations.predict.run import check_writable, preparation_of, writers
    from chainward_simulations.predict.run import predict as predict_all

    check_writable(to_csv, to_json)
    predictor = open_model(model, lambda run: find_run(run, directory), name)
    preparation = preparation_of(predictor.record, site, fit, scale)
    found = open_inputs(inputs, predictor.record, preparation, column=column, images=images, split=split)
    unwritten: list[Problem] = []
    with writers(predictor, sr, heatmap, unwritten) as each:
        abstain = Abstain(abstain_below, abstain_beyond)
        done = predict_all(predictor, found, abstain=abstain, each=each, console=errors)
    if to_csv is not None:
        write(to_csv, done.csv())
    if to_json is not None:
        write(to_json, done.json())
    if to_csv is None and to_json is None:
        typer.echo(done.csv(), nl=False)
    for problem in [*done.problems, *unwritten]:
        errors.say(f"{problem.name}: {problem.reason}", style="yellow")
    _tell_of_all(done)
    raise typer.Exit(1 if done.problems or unwritten else 0)


def _tell_of_all(done: Predictions) -> None:
    from chainward_simulations.predict.answers import USE

    abstained = sum(answer.abstains is not None for answer in done.answers)
    passed = f", {len(done.problems)} passed over" if done.problems else ""
    model = done.predictor.sha256[:12]
    errors.say(f"{len(done.answers)} images predicted{passed}; the model abstains at {abstained}; model {model}; {USE}")
    if done.predictor.record.familiarity is None:
        errors.say("the model carries no statistics of embeddings, so only its probability can make it abstain")
    if done.scores is not None:
        balanced = score(done.scores.balanced_accuracy)
        errors.say(f"against the data file's labels: balanced accuracy {balanced}, n = {done.scores.n}")
