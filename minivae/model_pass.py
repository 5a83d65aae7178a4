"""A step of a model: its networks, latent and loss in order, bound to the memory of a batch."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from .backends.reference import Call
from .network import NetworkBuffers, NetworkPass
from .objective import Objective
from .ops.activations import IDENTITY
from .ops.elbo import LOSS, TOTALS_SIZE
from .ops.philox import Noise
from .ops.state import BETA, CAPACITY, SCHEDULE_COLUMNS, new_state
from .params import Parameters

if TYPE_CHECKING:
    from .models import Autoencoder


INFERENCE_BATCH = 100
"""Rows that encode, decode and evaluate run at once, draws counted. Fixed, since evaluation's noise
belongs to a row of a batch, and small, so that it seldom needs more memory than training has."""


class ModelBuffers:
    """Every array that inference, and batches of up to `rows` images with `draws` of z in all,
    need, but for parameters."""

    def __init__(self, model: "Autoencoder", rows: int, draws: int) -> None:
        backend, dtype, d = model.backend, model.dtype, model.latent
        self.rows = batch = max(rows, INFERENCE_BATCH)
        self.draws = draws = max(draws, INFERENCE_BATCH)
        by_draws = model.objective.by_draws
        self.x = backend.zeros((batch, model.pixels), dtype)
        self.onehot = backend.zeros((batch, model.classes), dtype)
        self.encoder = NetworkBuffers(model.encoder, backend, batch, dtype)
        self.decoder = NetworkBuffers(model.decoder, backend, draws, dtype)
        self.z = backend.zeros((draws, d), dtype)
        self.dz = backend.zeros((draws, d), dtype)
        self.kl = backend.zeros((batch, 0 if by_draws else d), dtype)
        self.kl_weight = backend.zeros((self.kl.shape[1],), dtype)
        self.log_ratio = backend.zeros((draws if by_draws else 0,), dtype)
        self.weights = backend.zeros((draws if by_draws else 0,), dtype)
        self.reconstruction = backend.zeros((batch,), dtype)
        self.variance = backend.zeros((1,), dtype)
        self.passes: dict[tuple[int, int], ModelPass] = {}


class ModelPass:
    """A model bound to the memory of one batch size. `x` (rows, pixels) is where the batch goes,
    `onehot` (rows, classes) its labels; `code` (rows draws, d) is the decoder's input."""

    def __init__(
        self,
        model: "Autoencoder",
        parameters: Parameters,
        memory: ModelBuffers,
        rows: int,
        draws: int,
    ) -> None:
        self.model, self.backend, self.rows = model, model.backend, rows
        self.x, self.onehot = memory.x[:rows], memory.onehot[:rows]
        self.reconstruction = memory.reconstruction[:rows]
        self.kl, self.kl_weight = memory.kl[:rows], memory.kl_weight
        self.variance = memory.variance
        images = self.x.reshape(rows, *model.image_shape)
        self.encoder = NetworkPass(
            model.encoder, self.backend, parameters, memory.encoder, images, onehot=self.onehot
        )
        if model.latent:
            self.code, self.dcode = memory.z[: rows * draws], memory.dz[: rows * draws]
            below = IDENTITY
        else:
            self.code, self.dcode = self.encoder.output, self.encoder.output_gradient
            below = self.encoder.output_activation
        self.by_draws = model.objective.by_draws
        self.logvar_factor = model.logvar_factor
        self.log_ratio = memory.log_ratio[: rows * draws]
        self.weights = memory.weights[: rows * draws]
        self.decoder = NetworkPass(
            model.decoder,
            self.backend,
            parameters,
            memory.decoder,
            self.code,
            dz_below=self.dcode,
            below=below,
            onehot=self.onehot,
        )
        # They come after all input gradients, since the optimizer may change the weights with them.
        self.weight_gradient_calls = [
            *self.decoder.weight_gradient_calls,
            *self.encoder.weight_gradient_calls,
        ]

    def forward_calls(
        self,
        noise: Noise,
        schedule: Any,
        state: Any,
        totals: Any,
        objective: Objective | None = None,
    ) -> list[Call]:
        """From `x` to the loss, which is added to `totals`, and its gradient before the decoder's
        output activation. The loss is the model's objective unless another is given."""
        objective = objective or self.model.objective
        calls = list(self.encoder.forward_calls)
        head, z = self.encoder.output, self.code
        if self.by_draws:
            ratio, factor = self.log_ratio, self.logvar_factor
            calls.append(Call("importance_latent_forward", head, z, ratio, factor, noise, state))
        elif self.model.latent:
            calls.append(Call("latent_forward", head, z, self.kl, noise, state))
        calls += self.decoder.forward_calls
        calls += self._importance_loss() if self.by_draws else self._reconstruction_loss(objective)
        return [*calls, self._totals(objective, schedule, state, totals)]

    def mean_loss(self, noise: Noise, objective: Objective | None = None) -> float:
        """The mean loss of the rows in `x`, at the final beta and capacity of the model's objective
        unless another is given."""
        objective = objective or self.model.objective
        schedule = np.zeros((1, SCHEDULE_COLUMNS), self.model.dtype)
        schedule[0, BETA], schedule[0, CAPACITY] = objective.beta, objective.capacity
        totals = self.backend.zeros((TOTALS_SIZE,), np.float64)
        state = self.backend.asarray(new_state())
        calls = self.forward_calls(noise, self.backend.asarray(schedule), state, totals, objective)
        self.backend.sequence(*calls)
        return float(self.backend.to_numpy(totals)[LOSS]) / self.rows

    def _totals(self, objective: Objective, schedule: Any, state: Any, totals: Any) -> Call:
        """The loss from its terms, added to `totals`, and the weight of each KL."""
        terms, weight = (self.reconstruction, self.kl, schedule, state), self.kl_weight
        if objective.capacity and self.model.latent:
            return Call("capacity_totals", *terms, weight, totals)
        return Call("elbo_totals", *terms, objective.free_bits, weight, totals)

    def _importance_loss(self) -> list[Call]:
        """The loss and its gradient where both come from draws alone."""
        shape = (len(self.code), self.x.shape[1])
        logits = self.decoder.output.reshape(shape)
        dlogits = self.decoder.output_gradient.reshape(shape)
        x, ratio, v, loss = self.x, self.log_ratio, self.weights, self.reconstruction
        scale = 1 / self.rows
        importance = self.model.objective.estimator == "importance"
        call = Call("importance_loss", logits, x, ratio, v, loss, dlogits, scale, importance)
        return [call, *self.decoder.output_gradient_calls()]

    def _reconstruction_loss(self, objective: Objective) -> list[Call]:
        """The loss and its gradient before the activation that made the output."""
        y = self.decoder.output.reshape(self.x.shape)
        da = self.decoder.output_gradient.reshape(self.x.shape)
        loss, scale = self.reconstruction, 1 / self.rows
        if objective.likelihood == "bernoulli":
            call = Call("bernoulli_loss", y, self.x, loss, da, scale)
            return [call, *self.decoder.output_gradient_calls()]
        weight, activation = objective.error_weight, self.decoder.output_activation
        calls = [Call("squared_error_loss", y, self.x, loss, da, scale, weight, activation)]
        if objective.calibrated:
            calls.append(Call("calibrate_gaussian", loss, da, self.variance))
        return calls

    def input_gradient_calls(self, noise: Noise, state: Any) -> list[Call]:
        """To the gradient at every layer's output, after `forward_calls` of the same noise and
        state."""
        calls = list(self.decoder.input_gradient_calls)
        head, dz, dhead = self.encoder.output, self.dcode, self.encoder.output_gradient
        if self.by_draws:
            v, scale, factor = self.weights, 1 / self.rows, self.logvar_factor
            arguments = (head, dz, v, dhead, scale, factor, noise, state)
            calls.append(Call("importance_latent_backward", *arguments))
        elif self.model.latent:
            calls.append(Call("latent_backward", head, dz, self.kl_weight, dhead, noise, state))
        if self.model.latent:
            calls += self.encoder.output_gradient_calls()
        return [*calls, *self.encoder.input_gradient_calls]

    def backward(self, noise: Noise, state: Any) -> None:
        """All parameter gradients, after `forward_calls` of the same noise and state."""
        self.backend.sequence(*self.input_gradient_calls(noise, state))
        gradients = self.model.parameters.flat["gradients"]
        self.backend.weight_gradients(self.weight_gradient_calls, gradients)

    def named_tensors(self) -> Iterator[tuple[str, Any]]:
        """Every tensor of the step in the order in which it is computed, for a search for the
        first that is not finite."""
        yield "batch", self.x
        yield from self.model.parameters.values.items()
        for network in (self.encoder, self.decoder):
            if network is self.decoder and self.model.latent:
                yield "latent z", self.code
                yield (
                    ("log p(z) - log q(z|x)", self.log_ratio) if self.by_draws else ("KL", self.kl)
                )
            for stage in network.stages:
                yield f"output of {stage.name} ({stage.layer.kind})", stage.y
        yield "reconstruction loss", self.reconstruction
