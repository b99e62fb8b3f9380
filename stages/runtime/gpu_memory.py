"""Says which parameter lowers a stage's use of GPU memory."""

LESS_MEMORY = {
    "latents": "lower latents.batch_size",
    "pretrain": "lower pretrain.decode_batch_size, set pretrain.gradient_checkpointing to "
    '"all", or raise pretrain.grad_accumulation (then fewer images are negatives)',
    "pretrain_base": "use more GPUs",
    "features": "lower features.batch_size",
    "baselines": "lower features.batch_size",
    "transfer": "lower features.batch_size, or transfer.finetune_batch_size",
    "class_condition": "lower class_condition.batch_size",
    "separability": "lower features.batch_size",
    "generate": "lower generate.batch_size",
    "reference": "lower reference.batch_size",
    "score": "lower score.batch_size",
}


def how_to_need_less(stage: str, error: BaseException) -> str:
    """Return the message for a torch.OutOfMemoryError: what happened, and what to change."""
    what = str(error).partition(". GPU")[0].partition("\n")[0]
    return f"the GPU's memory ran out ({what}); {LESS_MEMORY.get(stage, 'use a larger GPU')}"
