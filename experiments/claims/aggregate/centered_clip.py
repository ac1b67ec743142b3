"""A small bias in every step: centered clipping with momentum at the workers, and rules without memory."""

import jax

from experiments.claims import byzantine, harness
from steelyard import aggregate

SEEDS = 5
STEPS = 300
BAD = 2
RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
CLIP_GRID = {"rate": (0.03, 0.1, 0.3), "radius": (0.1, 1.0)}
WHY = (
    "with momentum, two of ten workers within 1.5 standard deviations hardly move any of the rules: the radius that is "
    "best clips next to nothing, and all four end near 95%"
)
WHY_KRUM = "Krum follows one worker at a time, and with or without momentum its seeds differ by about a point"


def centered_clip() -> tuple[harness.Outcome, ...]:
    """Under "a little is enough", clipping with workers' momentum beats Krum, median and trimmed mean with it.

    And each of the four rules is worse without the momentum.

    Direction: accuracy up, in all seven comparisons.
    Metric: test accuracy after the last step.
    Budget: digits, perceptron 64-32-10, 300 steps, 10 workers with 16 examples each, 2 of which send the mean minus 1.5
    standard deviations of what the 8 others send; momentum 0.9 or none; rates 0.03, 0.1, 0.3 times radius 0.1, 1 for
    clipping, rates 0.01 to 3 for the others: 6 configurations each; 5 seeds.
    """
    rules = {
        "clipping": lambda config: aggregate.centered_clip(radius=config["radius"]),
        "Krum": lambda config: aggregate.krum(BAD),
        "median": lambda config: aggregate.median(),
        "trimmed mean": lambda config: aggregate.trimmed_mean(BAD),
    }
    arms = {name: _tune(rule, CLIP_GRID if name == "clipping" else {"rate": RATES}) for name, rule in rules.items()}
    options = dict(better="more", factor=100, unit="points of accuracy")
    return (
        *(
            harness.compare(
                arms["clipping"][0],
                arms[name][0],
                "accuracy",
                labels=("clipping", name),
                part=f"against {name}",
                why=WHY,
                **options,
            )
            for name in ("Krum", "median", "trimmed mean")
        ),
        *(
            harness.compare(
                *arms[name],
                "accuracy",
                labels=("momentum", "none"),
                part=f"{name} with momentum",
                why=WHY_KRUM if name == "Krum" else "",
                **options,
            )
            for name in rules
        ),
    )


def _tune(rule, grid) -> list[harness.Arm]:
    """The best arms with momentum and without, from one compiled program."""

    def attack(rows, key):
        del key
        return aggregate.attacks.alie(rows, BAD, z=1.5)

    @jax.jit
    def run(config, key):
        options = dict(steps=STEPS, momentum=config["momentum"])
        return {"accuracy": byzantine.accuracy(rule(config), attack, config["rate"], key, **options)}

    options = dict(seeds=SEEDS, metric="accuracy", better="more", vectorize=False)
    return [harness.tune(run, {**grid, "momentum": (momentum,)}, **options) for momentum in (0.9, 0.0)]
