"""What a loss declares about itself survives composition by hand, and changes nothing else."""

import jax.numpy as jnp

from steelyard import losses


def test_a_declared_loss_is_the_same_function():
    def contrast(outputs, batch):
        """Distance from the mean of the batch."""
        return {"contrast": outputs - outputs.mean()}

    declared = losses.batch_dependent(contrast)
    assert declared.batch_dependent
    assert declared.__doc__ == contrast.__doc__
    assert (declared(jnp.array([1.0, 3.0]), {})["contrast"] == jnp.array([-1.0, 1.0])).all()
    assert not hasattr(contrast, "batch_dependent")


def test_the_two_declarations_add_up():
    both = losses.with_example_state(losses.batch_dependent(lambda outputs, batch, table: ({"x": outputs}, table)))
    assert both.batch_dependent
    assert both.with_example_state


def test_losses_of_optax_are_here():
    assert losses.squared_error(jnp.array(3.0), jnp.array(1.0)) == 4.0
