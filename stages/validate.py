"""validate: params.yaml => build/validated, before any other stage.

DVC gives a stage the sections that it names, so that a mistyped section would reach nobody: this
stage depends on the whole file. Its out is a constant: it runs at every change and invalidates
nothing.
"""

from stages._runtime import PARAMS_FILE, Run, RuntimeSection, execute

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from contradiff.atomic import replace_file
from contradiff.config import Section, parse, read_params
from stages import (
    base,
    extractor,
    generate,
    latents,
    prepare,
    pretrain,
    pretrain_base,
    probe,
    report,
    score,
    shard,
    track,
    transfer,
)

# in the pipeline's order
STAGES: tuple[type[Section], ...] = (
    prepare.Params,
    shard.Params,
    pretrain_base.Params,
    base.Params,
    latents.Params,
    pretrain.Params,
    probe.Params,
    transfer.Params,
    generate.Params,
    extractor.Params,
    score.Params,
    report.Params,
    track.Params,
)


class Params(Section):
    """None by name: the whole file."""


def main(_params: Params, _run: Run) -> None:
    check(read_params(PARAMS_FILE), source=str(PARAMS_FILE))
    with replace_file(Path("build/validated")) as temporary:
        temporary.write_text("params.yaml is valid\n", encoding="utf-8")


def describe(_params: Params) -> str:
    content = read_params(PARAMS_FILE)
    check(content, source=str(PARAMS_FILE))
    return f"{PARAMS_FILE}: {len(content)} sections are valid"


def check(content: Mapping[str, Any], *, source: str) -> None:
    """Validate all sections for all stages.

    Args:
        content: a whole parameter file.
        source: the file's name, for messages.

    Raises:
        ValueError: all faults at once, one a line, each with its dotted key.
    """
    schemas = (*STAGES, RuntimeSection)
    known = {
        field.alias or name for schema in schemas for name, field in schema.model_fields.items()
    }
    # a dict, since several stages find the same fault
    faults = {
        f"{source}: {key}: unknown section; see presets/tiny.yaml for those that there are": None
        for key in content
        if key not in known
    }
    for schema in schemas:
        try:
            parse(schema, content, source=source)
        except ValueError as error:
            faults |= dict.fromkeys(str(error).splitlines())
    if not faults:
        faults = {f"{source}: {fault}": None for fault in contradictions(content)}
    if faults:
        raise ValueError("\n".join(faults))


def contradictions(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong between sections that no one stage has together."""
    data, latents = content["data"], content["latents"]
    conditioner, loss = content["conditioner"], content["loss"]
    if data["image_size"] % conditioner["patch_size"]:
        yield "conditioner.patch_size: must divide data.image_size"
    if loss["latent_views"] == "two" and latents["views"] < 2:
        yield "loss.latent_views: two needs latents.views of at least 2"
    if latents["colour_jitter"] > 0 and latents["views"] < 2:
        yield "latents.colour_jitter: is of random crops; with latents.views 1 there are none"
    if content["score"]["splits"] > content["generate"]["num_samples"]:
        yield "score.splits: more than generate.num_samples"


if __name__ == "__main__":
    execute(Params, main)
