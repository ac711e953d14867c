"""FRAME against wFRAME on one schedule: whose energy stays bounded, seed by seed."""

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from fastgen import check, data
from fastgen.functional import mmd
from fastgen.models.frame import WFRAME, energy_curves
from fastgen.models.frame_learner import Diverged
from fastgen.models.run import arguments_of, write_json


class CompareFRAME:
    """FRAME (β = 0) against wFRAME: energy's dissipation and collapse over one schedule, several seeds.

    The energy is U of the chains over the numbers in an image, the mean over chains in each round. A run counts as
    bounded where its size never exceeds `bound` and the chains do not diverge; a sample of the reference with σ = 1 has
    0.5. Whether samples are good is another question: the chains' variance over the data's and their MMD² to the test
    images (`F.mmd`'s own kernel) stand beside it.

    Source: the stability experiment (figure 3) of Cai et al., FRAME Revisited, AAAI 2019, whose settings are not known.

    Args:
        base: "generative-convnet" or "deep-frame".
        beta: wFRAME's β.
        penalty: "energy" or "score", see `fastgen train wframe --help`.
        seeds: how many seeds, from 0.
        bound: of the energy's size.
        lr: the optimizer's step size, not lowered over the run.
        optimizer: "adam" or "sgd".
        epochs: passes over the data, or ten rounds each.
        options: further options of wframe as a dict, {"width": 8} say.
    """

    def __init__(
        self,
        base: str = "generative-convnet",
        beta: float = 0.1,
        penalty: str = "energy",
        seeds: int = 3,
        bound: float = 3.0,
        lr: float = 3e-3,
        optimizer: str = "adam",
        epochs: int = 8,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.seeds = check.integer("seeds", seeds, least=1)
        self.beta = check.number("beta", beta, above=0)
        self.bound = check.number("bound", bound, above=0)
        schedule = {"lr": lr, "lr_final": 1.0, "optimizer": optimizer, "epochs": epochs}
        defaults = {"width": 8, "chains": 32} if base == "generative-convnet" else {}
        own = {"base": base, "penalty": penalty}
        self.settings: dict[str, Any] = arguments_of({**own, **schedule, **defaults, **(options or {})})
        for key in ("beta", "seed"):
            if options and key in options:
                raise ValueError(f"options: {key} is an option of its own here")
        try:
            self._models = [
                (name, seed, WFRAME(**{**self.settings, "beta": b, "seed": seed}))
                for seed in range(self.seeds)
                for name, b in (("FRAME", 0.0), ("wFRAME", self.beta))
            ]
        except TypeError as error:
            raise ValueError(f"options: {error}") from None

    def run(
        self,
        images: data.Images,
        out: str | os.PathLike[str],
        *,
        resume: bool = False,
        trainer: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Train all of them below `out`, one after another; write compare.json, energy.png and chains.png.

        resume: go on with runs that are there already
        """
        from fastgen import report

        folder = Path(out)
        if (folder / "run.json").exists():
            raise check.UserError(f"out: {folder} holds the run of a model: give another folder")
        rows: list[dict[str, Any]] = []
        curves: dict[str, list[Tensor]] = {"FRAME": [], "wFRAME": []}
        panels: dict[str, Tensor] = {}
        for name, seed, model in self._models:
            place = folder / f"{name.lower()}-{seed}"
            end = "finished"
            try:
                model.fit(images, place, resume=resume and (place / "run.json").exists(), trainer=trainer)
            except Diverged:
                end = "diverged"
            learner = model.learner
            assert learner is not None
            energies = learner.energies[learner.energies.isfinite()]
            curves[name].append(energies)
            largest = float(energies.abs().max()) if len(energies) else None
            bounded = end == "finished" and largest is not None and largest <= self.bound
            chains = learner.image(learner.chains.nan_to_num())
            rows.append(
                {
                    "model": name,
                    "seed": seed,
                    "bounded": bounded,
                    "end": end,
                    "largest": largest,
                    "last": float(energies[-1]) if len(energies) else None,
                    # Chains that have run to one picture, or to black and white, show here.
                    "variance": float(chains.var(0).mean() / images.train.var(0).mean()),
                    "mmd": float(mmd(chains.flatten(1), images.test.flatten(1))),
                }
            )
            panels.setdefault("data", images.train[:: max(1, len(images.train) // 16)][:16])
            if seed == 0:
                panels[f"{name}, last chains"] = chains[:16]
        result = {
            "data": images.name,
            "beta": self.beta,
            "bound": self.bound,
            "settings": self.settings,
            "runs": rows,
            **{
                f"{name} bounded": f"{sum(r['bounded'] for r in rows if r['model'] == name)} of {self.seeds}"
                for name in curves
            },
        }
        energy_curves(folder / "energy.png", curves)
        report.samples(folder / "chains.png", panels, side=4)
        write_json(folder / "compare.json", result)
        return result


def table(result: dict[str, Any]) -> str:
    """The runs as a Markdown table."""
    heads = ("", "seed", "energy stays bounded", "largest", "last", "chains' variance over the data's", "MMD² to test")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for r in result["runs"]:
        word = "yes" if r["bounded"] else ("no, diverged" if r["end"] == "diverged" else "no")
        keys = ("largest", "last", "variance", "mmd")
        numbers = " | ".join("none" if r[key] is None else f"{r[key]:.3g}" for key in keys)
        lines.append(f"| {r['model']} | {r['seed']} | {word} | {numbers} |")
    return "\n".join(lines)
