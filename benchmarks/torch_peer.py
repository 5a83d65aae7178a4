"""PyTorch as a peer: the same model, weights, data and optimizer, as its users write them."""

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional

from minivae.export import Module, modules
from minivae.models import Autoencoder
from minivae.network import Network

from .cases import Case, byte_images

COMPILED = {
    "compile": "default",
    "compile-max-autotune": "max-autotune",
    "compile-graph": "max-autotune-no-cudagraphs",
}
"""The ways that go through `torch.compile`, and with which mode."""

CAPTURED = ("graph", "graph-nchw", "compile-graph")
"""The ways whose whole step is a CUDA graph, captured by hand at the first one."""


def is_convolutional(model: Autoencoder) -> bool:
    """Whether the model's first layer makes images of images."""
    return len(model.encoder.shapes[1]) == 3


def _sequential(network: Network, model: Autoencoder) -> nn.Sequential:
    values = {k: model.backend.to_numpy(v) for k, v in model.parameters.values.items()}
    return nn.Sequential(*(_module(module) for module in modules(network, values)))


def _module(module: Module) -> nn.Module:
    positional = [value for name, value in module.arguments.items() if name.isdigit()]
    named = {name: value for name, value in module.arguments.items() if not name.isdigit()}
    result: nn.Module = getattr(nn, module.name)(*positional, **named)
    for name, tensor in module.tensors.items():
        getattr(result, name).data = torch.from_numpy(tensor.copy())
    return result


class TorchModel(nn.Module):
    """The autoencoder or VAE; `forward` gives the batch's mean loss for images and noise."""

    def __init__(self, model: Autoencoder) -> None:
        super().__init__()
        self.encoder = _sequential(model.encoder, model)
        self.decoder = _sequential(model.decoder, model)
        self.latent, self.objective = model.latent, model.objective

    def forward(self, x: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        code = self.encoder(x)
        if not self.latent:
            return self._reconstruction(code, x) / len(x)
        mu, logvar = code.chunk(2, dim=1)
        divergence = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
        loss = self._reconstruction(mu + torch.exp(0.5 * logvar) * eps, x)
        return (loss + self.objective.beta * divergence) / len(x)

    def _reconstruction(self, code: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        output = self.decoder(code)
        if self.objective.likelihood == "bernoulli":
            return functional.binary_cross_entropy_with_logits(output, x, reduction="sum")
        return self.objective.error_weight * functional.mse_loss(output, x, reduction="sum")


class TorchPeer:
    """One way of running PyTorch's step: eager, one of COMPILED, or one of CAPTURED."""

    def __init__(self, case: Case, device: str, mode: str) -> None:
        self.batch = case.training.batch_size
        self.device = torch.device(device)
        self.model = TorchModel(case.model).to(self.device)
        if is_convolutional(case.model) and not mode.endswith("nchw"):
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        adam = case.training.optimizer
        kind = torch.optim.AdamW if adam.weight_decay else torch.optim.Adam
        self._captured = mode in CAPTURED
        capturable = {"capturable": True} if self._captured else {}
        self.optimizer = kind(
            self.model.parameters(),
            lr=adam.lr,
            betas=(adam.beta1, adam.beta2),
            eps=adam.epsilon,
            weight_decay=adam.weight_decay,
            fused=True,
            **capturable,
        )
        images = torch.tensor(byte_images(case)).permute(0, 3, 1, 2)
        self.data = images.contiguous().to(self.device)
        self.eps = torch.zeros(self.batch, max(case.model.latent, 1), device=self.device)
        compiled = COMPILED.get(mode)
        loss = torch.compile(self.model, mode=compiled) if compiled else self.model
        self._loss: Callable[..., torch.Tensor] = loss
        self._batches = self._permuted()
        self._graph: torch.cuda.CUDAGraph | None = None

    def _permuted(self) -> Iterator[torch.Tensor]:
        while True:
            order = torch.randperm(len(self.data), device=self.device)
            for first in range(0, len(order) - self.batch + 1, self.batch):
                yield order[first : first + self.batch]

    def loss(self, x: torch.Tensor, eps: torch.Tensor) -> float:
        """The loss of given images (n, c, h, w) and noise with the present weights."""
        with torch.no_grad():
            return float(self.model(x.to(self.device), eps.to(self.device)))

    def _step(self, index: torch.Tensor) -> None:
        x = self.data[index].float().div_(255)
        if self.model.latent:
            self.eps.normal_()
        self.optimizer.zero_grad(set_to_none=True)
        self._loss(x, self.eps).backward()
        self.optimizer.step()

    def _capture(self) -> torch.cuda.CUDAGraph:
        self.index = next(self._batches).clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._step(self.index)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step(self.index)
        return graph

    def step(self) -> None:
        """One training step."""
        if not self._captured:
            self._step(next(self._batches))
            return
        if self._graph is None:
            self._graph = self._capture()
        self.index.copy_(next(self._batches))
        self._graph.replay()

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
