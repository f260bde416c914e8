"""Faults of curves of thresholds: how they are drawn from, steered, measured and asked."""

from mutant import Mutant, of

_TESTS = "tests/test_dial.py"

# fmt: off
MUTANTS: list[Mutant] = [
    *of(
        "lte_jax/sparsity.py", _TESTS,
        ("all steps draw the same target", "test_each_step_draws_its_target",
         "jnp.mod(jax.random.uniform(key) + place, 1.0)", "jnp.mod(0.5 + place, 1.0)"),
        ("microbatches draw the same target", "test_each_step_draws_its_target",
         "jax.random.uniform(key) + place", "jax.random.uniform(key)"),
        ("targets are drawn by sparsity", "test_each_step_draws_its_target",
         "target_sparsity=1 - (1 - depth) ** 2",
         "target_sparsity=0.3 + 0.6 * jnp.mod(jax.random.uniform(key) + place, 1.0)"),
        ("the curve is corrected the wrong way", "test_a_step_corrects_the_curve_near_its_target",
         "error = active_fraction - (1.0 - self.target_sparsity) * share",
         "error = (1.0 - self.target_sparsity) * share - active_fraction"),
        ("all points are corrected alike", "test_a_step_corrects_the_curve_near_its_target",
         "_CURVE_GAIN * self._shares(self.target_sparsity) + _SHARED_GAIN",
         "_CURVE_GAIN + 0 * self._shares(self.target_sparsity)"),
        ("a curve may fall", "test_a_step_corrects_the_curve_near_its_target",
         "self.on_curve(jax.lax.cummax(logits_K))", "self.on_curve(logits_K)"),
        ("drifting scores are driven on", "test_scores_are_kept_from_drifting",
         "slope * jnp.mean(self.logits_K, axis=0)", "-slope * jnp.mean(self.logits_K, axis=0)"),
        ("the curve starts at one half", "test_the_controller_starts_on_the_curve",
         "np.log(thresholds_KR / (1 - thresholds_KR))", "0 * thresholds_KR"),
    ),
    *of(
        "lte_jax/calibration.py", _TESTS,
        ("layers share a threshold", "test_each_layer_skips_what_is_asked",
         "together = not model.lte.per_layer", "together = True"),
        ("a curve begins in the middle", "test_a_curve_rises_from_end_to_end",
         "CURVE_ENDS = (0.05, 0.95)", "CURVE_ENDS = (0.5, 0.95)"),
        ("a curve says what was wanted", "test_a_curve_rises_from_end_to_end",
         "_PASSES = 8", "_PASSES = 1"),
    ),
    *of(
        "lte_jax/config/experts.py", _TESTS,
        ("beyond the curve its end is taken", "test_what_makes_no_sense_is_refused",
         "if not shares[0] <= sparsity <= shares[-1]:", "if False:"),
        ("a threshold of a point nearby", "test_the_sparsity_asked_for_is_what_one_gets",
         "np.interp(sparsity, shares, column)", "np.interp(round(sparsity, 1), shares, column)"),
        ("a model of several thresholds has one", "test_each_layer_skips_what_is_asked",
         "if lte.per_layer and lte.curve and lte.target_sparsity is not None:", "if False:"),
    ),
    *of(
        "lte_jax/training_step.py", _TESTS,
        ("the pressure is of all layers", "test_pressure_is_of_each_layer",
         "weight_N = control.efficiency_weight", "weight_N = jnp.mean(control.efficiency_weight)"),
        ("each step has the model's threshold", "test_a_training_step_uses_what_it_draws",
         "control = state.control.drawn(target_key, place)", "control = state.control"),
    ),
    *of(
        "lte_jax/routing.py", _TESTS,
        ("of several sparsities the first counts", "test_every_entry_takes_it",
         "found = {s: dial(lte, routing, threshold, s) for s in sparsity}",
         "found = {s: dial(lte, routing, threshold, sparsity[0]) for s in sparsity}"),
        ("two ways of asking at once", "test_what_makes_no_sense_is_refused",
         "    if threshold is not None:\n        raise UserError(f\"threshold",
         "    if False:\n        raise UserError(f\"threshold"),
    ),
]
