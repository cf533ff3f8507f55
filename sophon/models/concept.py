"""A word that is learned: what Textual Inversion trains of a text-to-image model (Gal et al., 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sophon.models.frozen import FrozenParts

_TEMPLATE = "a photo of"  # the word follows


class Concept(nn.Module):
    """A network that is told "a photo of *" whatever the prompt; the embedding of * is the only parameter.

    The network stays as it is but for a hook, by which it is told the same when it is called itself.

    Args:
        network: takes ``encoder_hidden_states``; neither trained nor registered here.
        frozen: the pipeline's other parts; it has one text encoder, which is not trained either.
        words: texts whose tokens' mean embedding * begins with, such as the names of classes.

    Attributes:
        vector: the embedding of *, float [D].

    Raises:
        UserError: the pipeline has no text encoder, or two.
    """

    def __init__(self, network: nn.Module, frozen: FrozenParts, words: Sequence[str]) -> None:
        super().__init__()
        like = next(network.parameters())
        tokenizer, encoder = frozen.text_encoder(like)
        start, known = (tokenizer(text, add_special_tokens=False).input_ids for text in (_TEMPLATE, " ".join(words)))
        ids = [tokenizer.bos_token_id, *start, start[0], tokenizer.eos_token_id]
        ids += [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(ids))
        self._ids, self._place = torch.tensor([ids], device=like.device), 1 + len(start)
        self._apart: tuple[Any, Any] = (network, encoder)  # a tuple, so that they are no modules of this one
        table: Tensor = encoder.get_input_embeddings().weight  # type: ignore[operator]
        self.vector = nn.Parameter(table[known].mean(0).detach().clone())
        network.register_forward_pre_hook(self._told, with_kwargs=True)

    def forward(self, *inputs: Any, **conditions: Any) -> Any:
        """Call the network."""
        return self._apart[0](*inputs, **conditions)

    def enable_gradient_checkpointing(self) -> None:
        """Have the network compute its activations again on the way back."""
        self._apart[0].enable_gradient_checkpointing()

    def states(self) -> Tensor:
        """Return what the text encoder makes of the text, float [1, tokens, D]."""
        encoder = self._apart[1]
        hook = encoder.get_input_embeddings().register_forward_hook(self._put)
        try:
            return encoder(self._ids)[0]  # type: ignore[no-any-return]
        finally:
            hook.remove()

    def _put(self, _: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        embedded = output.clone()
        embedded[:, self._place] = self.vector
        return embedded

    def _told(self, _: nn.Module, inputs: tuple[Any, ...], conditions: dict[str, Any]) -> Any:
        return inputs, conditions | {"encoder_hidden_states": self.states().expand(len(inputs[0]), -1, -1)}
