"""The few numbers by which experiments are compared, for `dvc exp show` and `dvc metrics diff`."""

from contradiff.report.results import RunResults


def headline(results: RunResults) -> dict[str, float]:
    """Return the main score of each measuring stage by a short name; a withheld score is missing.

    Accuracies are fractions. FID, KID and the error are better if they are lower.
    """
    score = results.score
    values = {
        "top1": results.probe.top1,
        "transfer": results.transfer.top1.mean,
        "fid": score.fid,
        "kid": score.kid,
        "precision": score.precision,
        "recall": score.recall,
        "error": results.separability.denoising_error.contradiff,
    }
    return {name: value for name, value in values.items() if value is not None}
