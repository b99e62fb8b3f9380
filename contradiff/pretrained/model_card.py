"""The model card of an export: README.md, whose header the Hugging Face hub reads."""

from pathlib import Path

from contradiff.pretrained.folder import ExportConfig

TEMPLATE = Path(__file__).with_name("model_card.md")


def model_card(config: ExportConfig, *, name: str, licence: str, with_base: bool) -> str:
    """Write the card: use, scores with their protocols, parameters, licence and limits.

    `name` is the folder or the id on the hub. `licence` is an identifier of the hub, such as
    "apache-2.0".
    """
    from huggingface_hub import EvalResult, ModelCardData
    from jinja2 import Environment, StrictUndefined

    probe, score = (config.metrics.get(key, {}) for key in ("probe", "score"))
    measured = [
        ("image-classification", "accuracy", f"top-1, {probe.get('protocol')}", probe.get("top1")),
        (
            "unconditional-image-generation",
            "fid",
            f"FID, {score.get('extractor')}",
            score.get("fid"),
        ),
    ]
    data = ModelCardData(
        license=licence,
        library_name="diffusers",
        base_model=config.base.path if config.base.revision else None,
        pipeline_tag="image-feature-extraction",
        tags=["contradiff", "lora", "image-classification", "image-generation"],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type=task,
                dataset_type="imagefolder",
                dataset_name=f"{len(config.class_names)} classes, {config.image_size} pixels",
                metric_type=metric,
                metric_name=title,
                metric_value=value,
            )
            for task, metric, title, value in measured
            if value is not None
        ],
    )
    has_base = with_base or config.base.revision is not None
    place = f'"{name}"' if has_base else f'"{name}", base="{config.base.path}"'
    template = Environment(  # noqa: S701 - Markdown, not HTML
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    ).from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        card_data=data.to_yaml(),
        config=config,
        name=name,
        place=place,
        licence=licence,
        with_base=with_base,
    )
