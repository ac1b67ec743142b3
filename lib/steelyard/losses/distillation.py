"""Divergences between a student's and a teacher's predictions, one number per example.

With `p = softmax(logits / temperature)` over the last axis. Everything is made of `log_softmax`, so that logits of
+-10^4 do no harm, in float32 at least. Nothing here stops a gradient: put `jax.lax.stop_gradient` on the teacher if it
does not train on the loss.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from steelyard import choices, precision

Logits = Float[Array, "*batch classes"]
PerExample = Float[Array, "*batch"]


def entropy(logits: Logits, *, temperature: float = 1.0) -> PerExample:
    """Entropy of a prediction, `-sum p log p`, in nats; log(classes) at most.

    Args:
      logits: finite; the classes are the last axis.
      temperature: what the logits are divided by, positive.

    Raises:
      ValueError: `temperature` is not positive.
    """
    log_p = _log_softmax(logits, temperature)
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def forward_kl(student_logits: Logits, teacher_logits: Logits, *, temperature: float = 1.0) -> PerExample:
    """`KL(teacher || student) = sum p_t (log p_t - log p_s)`: the student must cover what the teacher holds possible.

    Not multiplied by `temperature^2`, which would keep the size of its gradient.

    Args:
      student_logits: finite; the classes are the last axis.
      teacher_logits: of the same shape.
      temperature: of both, positive.

    Returns:
      Nats per example; zero for equal predictions.

    Raises:
      ValueError: `temperature` is not positive, or the shapes differ.

    Source: Distilling the Knowledge in a Neural Network (2015, Hinton et al.), section 2.
    """
    student, teacher = _both(student_logits, teacher_logits, temperature)
    return optax.losses.kl_divergence_with_log_targets(student, teacher)


def reverse_kl(student_logits: Logits, teacher_logits: Logits, *, temperature: float = 1.0) -> PerExample:
    """`KL(student || teacher) = sum p_s (log p_s - log p_t)`: the student must avoid what the teacher excludes.

    Arguments, result and errors are those of `forward_kl`. With the roles exchanged, `reverse_kl(teacher, student)` is
    `KL(teacher || student)` as a loss of the teacher.
    """
    student, teacher = _both(student_logits, teacher_logits, temperature)
    return optax.losses.kl_divergence_with_log_targets(teacher, student)


def balanced_kl(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    temperature: float = 1.0,
    major: float = 2.0,
    minor: float = 1.0,
) -> PerExample:
    """Both divergences, weighed for each example by which of the two models is the more certain.

        temperature^2 (a KL(teacher || student) + b KL(student || teacher))
        (a, b) = (major, minor)  where H(p_t) >= H(p_s)    the student is too certain: spread it out
                 (minor, major)  elsewhere                 sharpen it

    with H the entropy at this temperature. Nothing differentiates through the choice. To train both models online:

        student:  cross entropy + balanced_kl(student, stop_gradient(teacher))
        teacher:  cross entropy + reverse_kl(teacher, stop_gradient(student))

    Costs one softmax of either side, as one divergence does.

    Args:
      student_logits: finite; the classes are the last axis.
      teacher_logits: of the same shape.
      temperature: of both, positive.
      major: weight of the divergence that corrects the student's certainty, at least 0.
      minor: weight of the other, at least 0.

    Returns:
      Nats per example, weighed as above; zero for equal predictions.

    Raises:
      ValueError: a number out of its range, or the shapes differ.

    Source: BD-KD: Balancing the Divergences for Online Knowledge Distillation (2022, Amara et al.). The weights 2 and 1
    are a reading of it.
    """
    choices.require_within("major", major, "[0, inf)")
    choices.require_within("minor", minor, "[0, inf)")
    forward = forward_kl(student_logits, teacher_logits, temperature=temperature)
    reverse = reverse_kl(student_logits, teacher_logits, temperature=temperature)
    entropies = [entropy(logits, temperature=temperature) for logits in (teacher_logits, student_logits)]
    # A comparison has no gradient, so that the choice is constant as it stands.
    spread = entropies[0] >= entropies[1]
    weighed = jnp.where(spread, major, minor) * forward + jnp.where(spread, minor, major) * reverse
    return temperature**2 * weighed


def _log_softmax(logits: Logits, temperature: float) -> Logits:
    choices.require_within("temperature", temperature, "(0, inf)")
    return jax.nn.log_softmax(precision.wide(logits) / temperature)


def _both(student_logits: Logits, teacher_logits: Logits, temperature: float) -> tuple[Logits, Logits]:
    if jnp.shape(student_logits) != jnp.shape(teacher_logits):
        raise ValueError(
            "student and teacher must predict the same classes of the same examples: "
            f"their logits have shapes {jnp.shape(student_logits)} and {jnp.shape(teacher_logits)}"
        )
    return _log_softmax(student_logits, temperature), _log_softmax(teacher_logits, temperature)
