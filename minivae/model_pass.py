"""A step of a model: its networks, latent and loss in order, bound to the memory of a batch."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from .backends.reference import Call
from .network import Buffers, Pass
from .objective import Objective
from .ops.activations import IDENTITY
from .ops.elbo import LOSS, TOTALS_SIZE
from .ops.philox import Noise
from .ops.state import BETA, SCHEDULE_COLUMNS, new_state
from .params import Parameters

if TYPE_CHECKING:
    from .models import Autoencoder


class Memory:
    """Every array that batches of up to `batch` rows need, but for parameters."""

    def __init__(self, model: "Autoencoder", batch: int) -> None:
        backend, dtype, d = model.backend, model.dtype, model.latent
        draws = batch * model.objective.samples
        by_draws = model.objective.by_draws
        self.batch = batch
        self.x = backend.zeros((batch, model.pixels), dtype)
        self.onehot = backend.zeros((batch, model.classes), dtype)
        self.encoder = Buffers(model.encoder, backend, batch, dtype)
        self.decoder = Buffers(model.decoder, backend, draws, dtype)
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
        memory: Memory,
        rows: int,
        draws: int,
    ) -> None:
        self.model, self.backend, self.rows = model, model.backend, rows
        self.x, self.onehot = memory.x[:rows], memory.onehot[:rows]
        self.reconstruction = memory.reconstruction[:rows]
        self.kl, self.kl_weight = memory.kl[:rows], memory.kl_weight
        self.variance = memory.variance
        images = self.x.reshape(rows, *model.image_shape)
        self.encoder = Pass(
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
        self.decoder = Pass(
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

    def forward(
        self,
        noise: Noise,
        schedule: Any,
        state: Any,
        totals: Any,
        objective: Objective | None = None,
    ) -> None:
        """From `x` to the loss, which is added to `totals`, and its gradient before the decoder's
        output activation. The loss is the model's objective unless another is given."""
        objective = objective or self.model.objective
        calls = list(self.encoder.forward_calls)
        if self.by_draws:
            scaled = (self.log_ratio, self.logvar_factor, noise, state)
            arguments = (self.encoder.output, self.code, *scaled)
            calls.append(Call("importance_latent_forward", arguments))
        elif self.model.latent:
            drawn = (self.encoder.output, self.code, self.kl, noise, state)
            calls.append(Call("latent_forward", drawn))
        calls += self.decoder.forward_calls
        calls += self._importance_loss() if self.by_draws else self._reconstruction_loss(objective)
        self.backend.sequence(*calls, self._totals(objective, schedule, state, totals))

    def mean_loss(self, noise: Noise) -> float:
        """The mean loss of the rows in `x`, at the objective's final beta."""
        schedule = np.zeros((1, SCHEDULE_COLUMNS), self.model.dtype)
        schedule[0, BETA] = self.model.objective.beta
        totals = self.backend.zeros((TOTALS_SIZE,), np.float64)
        state = self.backend.asarray(new_state())
        self.forward(noise, self.backend.asarray(schedule), state, totals)
        return float(self.backend.to_numpy(totals)[LOSS]) / self.rows

    def _totals(self, objective: Objective, schedule: Any, state: Any, totals: Any) -> Call:
        """The loss from its terms, added to `totals`, and the weight of each KL."""
        terms = (self.reconstruction, self.kl, schedule, state)
        if objective.capacity and self.model.latent:
            bounds = (objective.capacity, objective.capacity_steps)
            return Call("capacity_totals", (*terms, *bounds, self.kl_weight, totals))
        return Call("elbo_totals", (*terms, objective.free_bits, self.kl_weight, totals))

    def _importance_loss(self) -> list[Call]:
        """The loss and its gradient where both come from draws alone."""
        logits, dlogits = self.decoder.output, self.decoder.output_gradient
        shape = (len(self.code), self.x.shape[1])
        arguments = (self.log_ratio, self.weights, self.reconstruction, dlogits.reshape(shape))
        importance = self.model.objective.estimator == "importance"
        scaled = (*arguments, 1 / self.rows, importance)
        loss = Call("importance_loss", (logits.reshape(shape), self.x, *scaled))
        return [loss, *self.decoder.carry_output_gradient()]

    def _reconstruction_loss(self, objective: Objective) -> list[Call]:
        """The loss and its gradient before the activation that made the output."""
        output = self.decoder.output.reshape(self.x.shape)
        doutput = self.decoder.output_gradient.reshape(self.x.shape)
        arguments = (output, self.x, self.reconstruction, doutput, 1 / self.rows)
        if objective.likelihood == "bernoulli":
            loss = Call("bernoulli_loss", arguments)
            return [loss, *self.decoder.carry_output_gradient()]
        weight, activation = objective.error_weight, self.decoder.output_activation
        calls = [Call("squared_error_loss", (*arguments, weight, activation))]
        if objective.calibrated:
            written = (self.reconstruction, doutput, self.variance)
            calls.append(Call("calibrate_gaussian", written))
        return calls

    def input_gradients(self, noise: Noise, state: Any) -> None:
        """The gradient at every layer's output, after `forward` with the same noise and state."""
        calls = list(self.decoder.input_gradient_calls)
        if self.by_draws:
            weighted = (self.encoder.output, self.dcode, self.weights, self.encoder.output_gradient)
            factors = (1 / self.rows, self.logvar_factor, noise, state)
            calls.append(Call("importance_latent_backward", (*weighted, *factors)))
            calls += self.encoder.carry_output_gradient()
        elif self.model.latent:
            upstream = (self.encoder.output, self.dcode, self.kl_weight)
            arguments = (*upstream, self.encoder.output_gradient, noise, state)
            calls.append(Call("latent_backward", arguments))
            calls += self.encoder.carry_output_gradient()
        self.backend.sequence(*calls, *self.encoder.input_gradient_calls)

    def backward(self, noise: Noise, state: Any) -> None:
        """All parameter gradients, after `forward` with the same noise and state."""
        self.input_gradients(noise, state)
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
