"""Reference statistics as ``.npz`` files, in the layout that EDM, pytorch-fid and clean-fid share: mu and sigma.

Files of fewstep hold besides ``n`` and a line of JSON under ``fewstep``, which other tools overlook: the extractor, its
fingerprint, its resize, the hash of its weights and the name of the data. Where it is there, it is checked.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import InputError
from fewstep.measure.features import Extractor
from fewstep.measure.files import read_npz, write_npz
from fewstep.measure.frechet import Moments, Target

# The modes of clean-fid, by the resize that they mean.
MODES = {"clean": "clean", "legacy_pytorch": "pytorch", "legacy_tensorflow": "tf1"}
_CLEAN_FID = re.compile(
    r"(?P<name>.+)_(?P<mode>clean|legacy_pytorch|legacy_tensorflow)(?P<clip>_clip_vit_b_32)?_"
    r"(?P<split>[a-z0-9]+)_(?P<res>\d+|na)\.npz"
)


@dataclass(frozen=True)
class Made:
    """What is known of how statistics were made; None is not known.

    Attributes:
        extractor: name of the extractor.
        fingerprint: of the extractor.
        resize: "tf1", "clean" or "pytorch", for extractors that resize.
        weights: sha256 of the extractor's weights.
        data: name of the pictures.
    """

    extractor: str | None = None
    fingerprint: str | None = None
    resize: str | None = None
    weights: str | None = None
    data: str | None = None

    @classmethod
    def by(cls, extractor: Extractor, data: str | None = None) -> Made:
        """That of an extractor."""
        resize, weights = (getattr(extractor, name, None) for name in ("resize", "weights"))
        return cls(extractor.name, extractor.fingerprint, resize, weights, data)


class Statistics:
    """Mean and covariance of the features of real pictures, from a file.

    Args:
        mean: (dim,) float64.
        covariance: (dim, dim) float64.
        n: how many pictures; None where the file does not say.
        made: what is known of them.
        source: names them in errors.

    Raises:
        InputError: shapes that do not fit, or values that are not finite.
    """

    def __init__(self, mean: Tensor, covariance: Tensor, n: int | None, made: Made, source: str) -> None:
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise InputError(
                f"{source} has mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)}, expected (dim,) and "
                f"(dim, dim): it is no file of reference statistics"
            )
        if not (mean.isfinite().all() and covariance.isfinite().all()) or (n is not None and n < 2):
            raise InputError(f"{source} has n={n} or values that are not finite, expected n >= 2: compute it again")
        self.mean, self.covariance, self.n, self.made, self.source = mean, covariance, n, made, source

    @property
    def target(self) -> Target:
        """The real side of a Frechet distance."""
        return Target(self.mean, self.covariance)

    def check(self, extractor: Extractor) -> Statistics:
        """Itself, if pictures may be compared with it under ``extractor``.

        Raises:
            InputError: another number of features, another extractor, other weights, or another resize, as far as the
                file says.
        """
        if extractor.dim != len(self.mean):
            raise InputError(
                f"{self.source} holds {len(self.mean)} features and extractor {extractor.name!r} gives "
                f"{extractor.dim}: choose the extractor that it was made with ({self.made.extractor or 'not stated'})"
            )
        ours = Made.by(extractor)
        for what in ("extractor", "resize", "weights", "fingerprint"):
            theirs, own = getattr(self.made, what), getattr(ours, what)
            if theirs is not None and own is not None and theirs != own:
                raise InputError(
                    f"{self.source} was made with {what} {theirs!r}, and extractor {extractor.name!r} has {own!r}: "
                    f"compare under the extractor and resize that it was made with, or compute it again"
                )
        return self

    def save(self, path: str | Path) -> None:
        """Writes ``mu``, ``sigma``, ``n`` where it is known, and what is known of the rest; whole or not at all.

        Raises:
            InputError: the place cannot be written.
        """
        arrays = {"mu": self.mean.numpy(), "sigma": self.covariance.numpy(), "fewstep": np.array(self._line())}
        write_npz(Path(path), arrays | ({} if self.n is None else {"n": np.array(self.n)}))

    def _line(self) -> str:
        return json.dumps(asdict(self.made))

    @classmethod
    def of(cls, moments: Moments, extractor: Extractor, data: str | None = None) -> Statistics:
        """Those of some moments. Raises InputError for fewer than two samples."""
        return cls(moments.mean, moments.covariance(), moments.n, Made.by(extractor, data), data or "statistics")

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Reads a file of fewstep, EDM, pytorch-fid or clean-fid, whose file names say how it was made.

        Raises:
            InputError: no such file, no ``.npz`` file, or one without mu and sigma.
        """
        path = Path(path).expanduser()
        data = read_npz(path)
        if missing := [key for key in ("mu", "sigma") if key not in data]:
            held = (
                "features, which clean-fid keeps for KID" if "feats" in data else ", ".join(sorted(data)) or "nothing"
            )
            raise InputError(f"{path} lacks {' and '.join(missing)}, it holds {held}: give a file of mu and sigma")
        mean, covariance = (torch.from_numpy(np.atleast_1d(data[k])).double() for k in ("mu", "sigma"))
        n = int(data["n"]) if "n" in data else None
        return cls(mean, covariance, n, _made(data, path), str(path))


def _made(data: dict[str, np.ndarray], path: Path) -> Made:
    if "fewstep" in data:
        try:
            body = json.loads(str(data["fewstep"]))
            return Made(**{key: body.get(key) for key in Made.__dataclass_fields__})
        except (ValueError, AttributeError) as error:
            raise InputError(f"{path} garbles what fewstep wrote about it ({error}): compute it again") from None
    named = _CLEAN_FID.fullmatch(path.name.lower())
    if named is None:
        return Made()
    # CLIP's own preprocessing stands in the place of the mode's resize.
    network, resize = ("clip", None) if named["clip"] else ("inception", MODES[named["mode"]])
    return Made(network, None, resize, None, named["name"])


def clean_fid_name(name: str, extractor: Extractor, *, split: str = "custom", side: int | None = None) -> str:
    """The file name under which clean-fid finds statistics of the Inception network; its own folder is ``stats``.

    Args:
        name: of the data.
        extractor: the Inception extractor they were made with.
        split: "train", "test", "trainval" or "custom".
        side: of the pictures in pixels; None for custom ones.

    Raises:
        InputError: an extractor that clean-fid does not have.
    """
    modes = {resize: mode for mode, resize in MODES.items()}
    resize = getattr(extractor, "resize", None)
    if extractor.name != "inception" or resize not in modes:
        raise InputError(f"clean-fid has no statistics of extractor {extractor.name!r}: use inception")
    return f"{name}_{modes[resize]}_{split}_{'na' if side is None else side}.npz".lower()
