"""Study of latent steps (n), supervision steps (N_sup) and recursion steps (T)."""

from dataclasses import replace
from pathlib import Path

from smallfry.report.page import image
from smallfry.report.run_pictures import Grid, draw_grids
from smallfry.report.runs import Outcome, accuracy_cell, best_of, deviation, mean, strong, where
from smallfry.report.runs_page import Section
from smallfry.report.table import NONE, number, table
from smallfry.studies import reported_vision as reported
from smallfry.studies.config import RecursionConfig
from smallfry.studies.recipes import Planned, recipe
from smallfry.studies.study_models import find_vitrm
from smallfry.training.config import ObjectiveConfig

TITLE = "Recursion"
ABOUT = (
    "A ViTRM is trained with n latent steps in a recursion step and up to N_sup recursion steps on "
    "each batch, each with an optimizer step of its own; a batch is left early once the model "
    "thinks that it is right. T recursion steps are chained when it is evaluated. Epochs are "
    "equal, time and optimizer steps are not: both stand beside. Framed, and bold, is what the "
    "selecting split likes best."
)
Kind = tuple[int, int, int]  # n, N_sup, T


def plan(config: RecursionConfig) -> list[Planned]:
    """List the runs of all n by all N_sup at the first T, and the other T at the middle n."""
    entry = find_vitrm(config.vitrm)
    found = []
    for seed in range(config.seeds):
        for n, supervised, t in _kinds(config):
            told = recipe(entry, config, config.batch_size, seed)
            told = replace(
                told,
                model=replace(told.model, latent_steps=n, recursion_steps=t),
                objective=ObjectiveConfig("deep_supervision", supervision_steps=supervised),
            )
            facts = {"latent_steps": n, "supervision_steps": supervised, "recursion_steps": t}
            name = f"n{n}-sup{supervised}-t{t}-s{seed}"
            found.append(Planned(name, {**facts, "seed": seed}, told))
    return found


def sections(config: RecursionConfig, outcomes: list[Outcome], folder: Path) -> list[Section]:
    """Build grids of accuracy and time, and the table of all runs."""
    groups = {
        (n, s, t): where(outcomes, latent_steps=n, supervision_steps=s, recursion_steps=t)
        for n, s, t in _kinds(config)
    }
    best = best_of(groups)
    file = folder / "pictures" / "recursion.png"
    draw_grids(_grids(config, groups), file)
    rows = []
    for kind, group in groups.items():
        cell = accuracy_cell(group)
        chosen = mean(group, lambda o: o.selected)
        macs = mean(group, lambda o: o.measured("macs"))
        rows.append(
            [
                *kind,
                "best of its grid" if _is_reported_best(kind) else NONE,
                strong(cell) if kind == best else cell,
                NONE if chosen is None else f"{chosen:.2f}",
                number(mean(group, _steps)),
                number(mean(group, lambda o: o.minutes)),
                NONE if macs is None else number(macs / 1e6),
            ]
        )
    head = ["n", "N_sup", "T", "CIFAR-10", "test %", "chosen at %", "steps a batch"]
    head += ["minutes", "MMAC"]
    ours = f"measured here, {Path(config.data.name).name}"
    spans = [("", 3), (f"reported, {reported.RECURSION_GRID}", 1), (ours, 5)]
    measured = [
        {
            "latent_steps": n,
            "supervision_steps": s,
            "recursion_steps": t,
            "test_percent": mean(group, lambda o: o.test),
            "deviation": deviation(group, lambda o: o.test),
            "selected_percent": mean(group, lambda o: o.selected),
            "steps_a_batch": mean(group, _steps),
            "minutes": mean(group, lambda o: o.minutes),
            "runs": len(group),
            "chosen": (n, s, t) == best,
        }
        for (n, s, t), group in groups.items()
    ]
    return [
        Section(
            "Accuracy by recursion",
            [image(file, "accuracy by recursion"), table(head, rows, text=(), groups=spans)],
            measured,
            {"source": reported.SOURCE, "best": reported.BEST_RECURSION},
        )
    ]


def _steps(outcome: Outcome) -> float | None:
    """Return the mean number of optimizer steps per batch."""
    taken = [row["supervision_steps"] for row in outcome.history if "supervision_steps" in row]
    return sum(taken) / len(taken) if taken else None


def _kinds(config: RecursionConfig) -> list[Kind]:
    first, *others = dict.fromkeys(config.recursion_steps)
    kinds = [(n, s, first) for n in config.latent_steps for s in config.supervision_steps]
    middle = _middle(config)
    kinds += [(middle, s, t) for t in others for s in config.supervision_steps]
    return list(dict.fromkeys(kinds))


def _middle(config: RecursionConfig) -> int:
    return config.latent_steps[len(config.latent_steps) // 2]


def _grids(config: RecursionConfig, groups: dict[Kind, list[Outcome]]) -> list[Grid]:
    t, n = config.recursion_steps[0], _middle(config)
    ns, sups, ts = config.latent_steps, config.supervision_steps, config.recursion_steps
    across = ("N_sup, supervision steps", sups)
    down = ("n, latent steps", ns)
    plane = {k: group for k, group in groups.items() if k[2] == t}
    times = {k: group for k, group in groups.items() if k[0] == n}

    def accuracy(kind: Kind) -> float | None:
        return mean(groups[kind], lambda o: o.test)

    found = [
        Grid(
            f"test accuracy, %, T = {t}",
            down,
            across,
            [[accuracy((a, s, t)) for s in sups] for a in ns],
            ringed=_place(best_of(plane), ns, sups, 0),
        ),
        Grid(
            f"minutes of training, T = {t}",
            down,
            across,
            [[mean(groups[a, s, t], lambda o: o.minutes) for s in sups] for a in ns],
            percent=False,
        ),
    ]
    if len(ts) > 1:
        found.append(
            Grid(
                f"test accuracy, %, n = {n}",
                ("T, recursion steps", ts),
                across,
                [[accuracy((n, s, b)) for s in sups] for b in ts],
                ringed=_place(best_of(times), ts, sups, 2),
            )
        )
    return found


def _place(
    best: Kind | None, rows: tuple[int, ...], columns: tuple[int, ...], axis: int
) -> tuple[int, int] | None:
    return None if best is None else (rows.index(best[axis]), columns.index(best[1]))


def _is_reported_best(kind: Kind) -> bool:
    named = reported.BEST_RECURSION
    return kind == (named["latent_steps"], named["supervision_steps"], 1)
