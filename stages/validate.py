"""validate: params.yaml => build/validated, before any other stage.

DVC gives a stage the sections that it names, so that a mistyped section would reach nobody: this
stage depends on the whole file. Its out is a constant: it runs at every change and invalidates
nothing.
"""

from stages.runtime.run import PARAMS_FILE, Run, RuntimeSection, execute

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from contradiff.base.config import SHIPPED_CONFIGS, config_folder, downsampling_of
from contradiff.base.loading import NoiseSchedule
from contradiff.config import Section, parse, read_params
from contradiff.features.inversion import chain_to
from contradiff.files import replace_file
from contradiff.method.fit import check_fit
from stages import (
    base,
    class_condition,
    conditions,
    extractor,
    features,
    generate,
    latents,
    prepare,
    pretrain,
    pretrain_base,
    probe,
    reference,
    report,
    score,
    separability,
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
    class_condition.Params,
    features.Params,
    probe.Params,
    transfer.Params,
    separability.Params,
    conditions.Params,
    generate.Params,
    extractor.Params,
    reference.Params,
    score.Params,
    report.Params,
    track.Params,
)


class Params(Section):
    """None by name: the whole file."""


def main(_params: Params, run: Run) -> None:
    content = read_params(PARAMS_FILE)
    check(content, source=str(PARAMS_FILE))
    try:
        check_with_base(content, root=run.root)
    except ValueError as error:
        named = (f"{PARAMS_FILE}: {fault}" for fault in str(error).splitlines())
        raise ValueError("\n".join(named)) from error
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


def check_with_base(content: Mapping[str, Any], *, root: Path) -> None:
    """Refuse what this base cannot serve; a hub's of unknown configuration, a later stage does.

    Args:
        content: a whole parameter file that `check` accepts.
        root: the project's folder.

    Raises:
        ValueError: a local base is not there; or all parameters that do not fit, one a line.
    """
    base_params = parse(base.Params, content, source=str(PARAMS_FILE)).base
    if base_params.source == "hub" and base_params.path not in SHIPPED_CONFIGS:
        return
    folder = config_folder(base_params, root=root, shipped=root / "presets")
    image_size, conditioner = content["data"]["image_size"], content["conditioner"]
    triples = [content["features"]["timesteps"], *content["features"]["more_triples"]]
    checks: list[Callable[[], object]] = [
        partial(
            check_fit,
            folder,
            image_size=image_size,
            lora_targets=content["lora"]["targets"],
            blocks={
                "head.block": [content["head"]["block"]],
                "features.more_blocks": content["features"]["more_blocks"],
                "features.model": ["mid+up.1"] if content["features"]["model"] == "diffeed" else [],
            },
            timesteps={
                "features.timesteps": triples[0],
                "features.more_triples": [step for triple in triples[1:] for step in triple],
            },
            num_inference_steps=content["generate"]["num_inference_steps"],
        )
    ]
    if content["features"]["noising"] == "ddim_chain":
        schedule = NoiseSchedule.of_base(folder)
        keys = ("features.timesteps", *("features.more_triples" for _ in triples[1:]))
        checks += [
            partial(chain_to, triple, schedule=schedule, key=key)
            for key, triple in zip(keys, triples, strict=True)
        ]
    faults: list[str] = []
    for check_one in checks:
        try:
            check_one()
        except ValueError as error:
            faults.append(str(error))
    latent_size = image_size // downsampling_of(folder)
    if conditioner["input"] == "latents" and latent_size % conditioner["patch_size"]:
        faults.append(
            f"conditioner.patch_size: must divide the latent's side of {latent_size} "
            f"(conditioner.input: latents; got {conditioner['patch_size']})"
        )
    if faults:
        raise ValueError("\n".join(faults))


def contradictions(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong between sections that no one stage has together."""
    data, latents = content["data"], content["latents"]
    conditioner, loss = content["conditioner"], content["loss"]
    if conditioner["input"] == "pixels" and data["image_size"] % conditioner["patch_size"]:
        yield "conditioner.patch_size: must divide data.image_size"
    cropped = conditioner["input"] == "latents" and conditioner["cond_view"] == "crop"
    if cropped and latents["views"] < 2:
        yield "conditioner.cond_view: crop of latents draws stored views; needs latents.views of 2"
    if loss["latent_views"] == "two" and latents["views"] < 2:
        yield "loss.latent_views: two needs latents.views of at least 2"
    if latents["colour_jitter"] > 0 and latents["views"] < 2:
        yield "latents.colour_jitter: is of random crops; with latents.views 1 there are none"
    if latents["colour_jitter"] > 0 and (
        loss["latent_views"] == "same" or loss["recon_passes"] > 3
    ):
        yield (
            "latents.colour_jitter: the distorted crops would be reconstructed too, as "
            "loss.latent_views: same and loss.recon_passes over 3 do; set it to 0"
        )
    for section in ("pretrain", "class_condition"):
        batch_size, num_train = content[section]["batch_size"], data["num_train"]
        if num_train is not None and content[section]["epochs"] and batch_size > num_train:
            yield (
                f"{section}.batch_size: {batch_size} is more than data.num_train {num_train}; "
                "lower it"
            )
    yield from of_scores(content)
    yield from of_null_conditions(content)
    if content["generate"]["condition"] == "class" and content["class_condition"]["epochs"] == 0:
        yield (
            "generate.condition: class needs a table of classes; make class_condition.epochs 1 or "
            "more (got 0)"
        )


def of_null_conditions(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield where sampling asks for a null condition that the reconstruction loss never trains."""
    generate, conditioner = content["generate"], content["conditioner"]
    # reconstructed: the second view's draws are, from the fourth on
    second_view = conditioner["cond_view"] == "noise" and content["loss"]["recon_passes"] > 3
    is_trained = conditioner["drop"] > 0 or second_view or content["pretrain"]["epochs"] == 0
    is_guided = generate["guidance"] != 1
    asks = generate["condition"] == "noise" or (generate["condition"] == "image" and is_guided)
    if asks and not is_trained:
        yield (
            "conditioner.drop: 0 never trains the null condition, which generate.condition: noise "
            "and guidance of images sample with; make it more than 0, such as 0.1"
        )
    if generate["condition"] == "class" and is_guided and content["class_condition"]["drop"] == 0:
        yield (
            "class_condition.drop: 0 never trains the null class, which generate.guidance needs; "
            "make it more than 0, such as 0.1, or generate.guidance 1"
        )


def of_scores(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield what would make scores of so many images impossible, after hours of sampling."""
    num_samples, section = content["generate"]["num_samples"], content["score"]
    if section["splits"] > num_samples:
        yield "score.splits: more than generate.num_samples"
    if section["kid_subset_size"] > min(num_samples, content["reference"]["num_kept"]):
        yield "score.kid_subset_size: more than generate.num_samples or reference.num_kept"
    params = parse(extractor.Params, content, source=str(PARAMS_FILE)).extractor
    if num_samples < params.num_features:
        yield (
            f"generate.num_samples: fewer than the {params.num_features} feature dimensions of "
            f"extractor.kind {params.kind}; FID needs at least as many (got {num_samples})"
        )


if __name__ == "__main__":
    execute(Params, main)
