"""Ray as the scheduler: a task per part, which runs again where a worker or its machine dies; then ``finish``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qkpatch.cluster.finish import finish
from qkpatch.common.observer import Observer
from qkpatch.errors import FileSystemError, QKPatchError, UsageError
from qkpatch.planning.manifest import Manifest

_TRIES = 5  # more, of a part whose worker died


def apply_on_ray(
    plan: Mapping[str, Any],
    out: str | Path,
    count: int,
    *,
    address: str,
    observer: Observer,
    threads: int | None,
    **how: Any,
) -> Manifest:
    """Write ``out`` in ``count`` parts, each a task of a Ray cluster, and return its manifest.

    Args:
        plan: arguments of :func:`qkpatch.plan` for workers, who need qkpatch, SOURCE and OUT by the same paths.
        out: where.
        count: how many parts.
        address: as of ``ray.init``: a cluster's, ``auto``, or ``local`` for one on this machine.
        observer: hears of parts.
        threads: of a task, which takes as many processors; by default one.
        how: as of :func:`qkpatch.apply`.

    Raises:
        UsageError: Ray is not installed, or has no cluster there.
        QKPatchError: as :func:`qkpatch.apply` and :func:`finish`.
    """
    try:
        import ray
    except ImportError as error:
        raise UsageError(
            "ray is not installed here", where="--ray", fix="pip install 'qkpatch[ray]'"
        ) from error
    where = f"--ray {address}"
    try:
        ray.init(address, include_dashboard=False, log_to_driver=False, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UsageError(f"Ray has no cluster there: {error}", where=where, fix="start it") from error
    needs: dict[str, Any] = {"num_cpus": threads or 1, "num_gpus": int(how["device"] != "cpu")}
    try:
        task: Any = ray.remote(_write).options(max_retries=_TRIES, scheduling_strategy="SPREAD", **needs)
        how |= {"out": out.absolute() if isinstance(out, Path) else out, "threads": threads or 1}
        waiting = [task.remote(plan, part=(i + 1, count), **how) for i in range(count)]
        observer.begins("", 0, count, "parts")
        while waiting:
            (done,), waiting = ray.wait(waiting)
            if (wrong := ray.get(done)) is not None:
                raise wrong
            observer.edited(1)
    except ray.exceptions.RayError as error:
        fix = "run the same again: parts that are done stay done"
        raise FileSystemError(f"Ray has given up: {error}", where=where, fix=fix) from error
    finally:
        ray.shutdown()
    return finish(out, strict=how["writing"].strict, observer=observer)


def _write(plan: Mapping[str, Any], **how: Any) -> QKPatchError | None:
    """On a worker: one part; what is wrong with it, as a value, since Ray wraps what is raised."""
    import qkpatch

    try:
        qkpatch.apply(qkpatch.plan(**plan), **how)
    except QKPatchError as error:
        return error
    return None
