"""What each operation of a transformer keeps for its backward pass, as rules on a tape.

Letters: `b` micro batch, `s` sequence, T = b s tokens, `h` hidden, `f` inner width, `r` rank. What is kept
follows torch 2.13, tools/autograd/derivatives.yaml; what runs follows transformers 5.23.
"""

from __future__ import annotations

from planner.estimate.attention_plan import AttentionPlan
from planner.estimate.forms import LayerForm, LinearForm, NormForm
from planner.estimate.nodes import Tensor, kept_factors
from planner.estimate.peft_operations import dora, scaled_by_vector
from planner.estimate.quantized_linear import quantized_product
from planner.estimate.recipes import Recipe
from planner.estimate.resident import block_bytes
from planner.estimate.tape import Tape
from planner.estimate.traits import Traits

__all__ = ["Operations"]

_HEAD = "lm_head"  # a linear layer of torch's, whatever class a model has for its own


class Operations(Tape):
    """A tape that knows the step's sizes: `tokens` T = b s, and the recipe's types."""

    __slots__ = (
        *("copied_bytes", "fp16", "handed_out", "prefix", "recipe", "seq_len", "stray_bytes", "tokens"),
        "traits",
    )

    def __init__(
        self,
        tokens: int,
        seq_len: int,
        recipe: Recipe,
        traits: Traits,
        *,
        prefix: int = 0,
        fp16: bool = False,
    ) -> None:
        """`traits` are the family's; `prefix` is the number of trained keys before a sample's. `fp16`: 16-bit
        numbers are of that type.
        """
        super().__init__()
        self.copied_bytes = 0  # held to the end of the forward pass: what autocast or a cache keeps
        self.stray_bytes = 0  # gradients that no parameter of the model holds, but the graph
        self.handed_out: list[Tensor] = []  # answers of attention that a layer's variable holds to its end
        self.prefix = prefix
        self.fp16 = fp16
        self.tokens = tokens
        self.seq_len = seq_len
        self.recipe = recipe
        self.traits = traits

    def cast(self, x: Tensor, element: int) -> Tensor:
        """x in another type; the same tensor where it has it already. Keeps nothing."""
        return x if x.element == element else self.op((x,), x.numel, element)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y in the wider type. Keeps nothing; both gradients are the output's."""
        return self.op((x, y), x.numel, max(x.element, y.element), aliases=True)

    def scaled(self, x: Tensor) -> Tensor:
        """x times a number. Keeps nothing."""
        return self.op((x,), x.numel, x.element)

    def product(self, x: Tensor, y: Tensor) -> Tensor:
        """x * y, element by element: each is kept for the other's gradient.

        Both gradients are there in the wider type before one is cast (torch/csrc/autograd/engine.cpp,
        validate_outputs).
        """
        kept = kept_factors(x, y)
        wide = max(x.element, y.element)
        narrow = [t for t in (x, y) if t.needs_grad and t.element < wide]
        wider = sum([block_bytes(t.numel * wide) - t.size_bytes for t in narrow])
        return self.op((x, y), x.numel, wide, kept, scratch_bytes=wider)

    def dropout(self, x: Tensor, probability: float) -> Tensor:
        """native_dropout: one byte of mask for each element, none where nothing is dropped."""
        if not probability:
            return x
        mask = Tensor(x.numel, 1, False)
        out = self.op((x,), x.numel, x.element, (mask,))
        self.nodes[-1].outputs = (out, mask)
        return out

    def linear(self, x: Tensor, form: LinearForm) -> Tensor:
        """W x + b, with LoRA and the adapter that the method puts there.

        x is kept where W is trained, never where it is frozen. Under autocast x and W are cast; the cast
        W is kept where x needs a gradient (aten/src/ATen/autocast_mode.cpp).
        """
        argument = x
        if form.scaled == "inputs":  # IA3 on a feed-forward layer: ia3/layer.py, `Linear.forward`
            x = scaled_by_vector(self, self.cast(x, self.recipe.adapter), x.element)
        out = quantized_product(self, x, form) if form.quantized else self._product_with_weight(x, form)
        self.hold(x, argument)  # the modules' arguments, also where autocast has multiplied a copy
        if form.rank:
            out = dora(self, x, out, form) if form.dora else self._lora(x, out, form)
        if form.scaled == "outputs":
            out = scaled_by_vector(self, out, out.element)
        if form.bottleneck:
            out = self.bottleneck(out, form.outputs, form.bottleneck)
            self.hold(x)  # a forward hook runs while the module's argument is there
        return out

    def _product_with_weight(self, x: Tensor, form: LinearForm) -> Tensor:
        base = form.element or self.recipe.base
        gradients = block_bytes(form.inputs * form.outputs * base) if form.weight_trained else 0
        biases = block_bytes(form.outputs * base) if form.bias_trained else 0
        own_class = self.traits.bias_added_apart and form.name != _HEAD
        if not own_class:
            return self._product(x, form.inputs, form.outputs, gradients, biases)
        cached = self.copied_bytes
        out = self._product(x, form.inputs, form.outputs, gradients, 0)
        self.copied_bytes = cached  # autocast caches no view, such as the weight turned round
        if not form.bias:
            return out
        return self.op((out,), out.numel, max(out.element, base), aliases=True, weight_bytes=biases)

    def _product(self, x: Tensor, inputs: int, outputs: int, gradients: int, biases: int) -> Tensor:
        """x W. `gradients` and `biases`: bytes of the gradients of W and b where they are trained."""
        rows = x.numel // inputs
        if not self.recipe.autocast:
            kept: tuple[Tensor, ...] = (x,) if gradients else ()
            return self.op(
                (x,),
                rows * outputs,
                x.element,
                kept,
                weight_bytes=gradients + biases,
                reads_weight=x.needs_grad,
            )
        x = self.cast(x, self.recipe.compute)
        weight = self.op((), inputs * outputs, self.recipe.compute, weight_bytes=gradients)
        if gradients:
            self.copied_bytes += weight.size_bytes
        kept = kept_factors(x, weight)
        return self.op(
            (x, weight),
            rows * outputs,
            x.element,
            kept,
            weight_bytes=biases,
            reads_weight=x.needs_grad,
        )

    def _lora(self, x: Tensor, result: Tensor, form: LinearForm) -> Tensor:
        """result + B(A(dropout(x))) alpha / r: peft/tuners/lora/layer.py, `Linear.forward`.

        Keeps x in the adapter's type (a copy of its own for each target module) for A's gradient, and
        A's output [T, r] for B's. Over a quantized layer autocast casts x itself (tuners/lora/bnb.py).
        """
        single = x if form.quantized and self.recipe.autocast else self.cast(x, self.recipe.adapter)
        down = self.trained(self.dropout(single, form.lora_dropout), form.inputs, form.rank)
        up = self.trained(down, form.rank, form.outputs)
        out = self.cast(self.add(result, self.scaled(up)), result.element)
        self.hold(x, single)
        return out

    def trained(self, x: Tensor, inputs: int, outputs: int, *, bias: bool = False) -> Tensor:
        """A trained layer that a method brought along, in the adapter's type."""
        element = self.recipe.adapter
        biases = block_bytes(outputs * element) if bias else 0
        return self._product(x, inputs, outputs, block_bytes(inputs * outputs * element), biases)

    def lora_rows(self, rows: Tensor, count: int, width: int, rank: int) -> Tensor:
        """rows + (A^T[ids] B^T) alpha / r: peft/tuners/lora/layer.py, `Embedding.forward`."""
        element = self.recipe.adapter
        tokens = rows.numel // width
        down = self.op((), tokens * rank, element, weight_bytes=block_bytes(count * rank * element))
        up = self.trained(down, rank, width)
        return self.cast(self.add(rows, self.scaled(up)), rows.element)

    def bottleneck(self, x: Tensor, width: int, size: int) -> Tensor:
        """x + up(relu(down(x))): planner/training/peft/adapter.py, `BottleneckAdapter.forward`.

        Keeps x in the adapter's type [T, h] and relu's output [T, m] once: relu and `up` share it.
        """
        down = self.trained(self.cast(x, self.recipe.adapter), width, size, bias=True)
        inner = self.op((down,), down.numel, down.element, keeps_output=True)
        up = self.trained(inner, size, width, bias=True)
        return self.cast(self.add(x, up), x.element)

    def norm(self, x: Tensor, form: NormForm, kind: str) -> Tensor:
        """The family's normalization."""
        return self.rms_norm(x, form) if kind == "rmsnorm" else self.layer_norm(x, form)

    def last_norm(self, x: Tensor, form: NormForm, kind: str) -> Tensor:
        """The normalization before the head."""
        return self.norm(x, form, kind)

    def head_norm(self, x: Tensor, form: NormForm, kind: str) -> Tensor:
        """The normalization of queries or keys."""
        return self.norm(x, form, kind)

    def rms_norm(self, x: Tensor, form: NormForm) -> Tensor:
        """w * x / sqrt(mean(x^2) + eps), in fp32: the models' own RMSNorm modules.

        Keeps x in fp32 (x itself where it is fp32: pow and mul share it) and 1 / sqrt(...); where w is
        trained also the normalized x, in x's type or in fp32. Backward: mul,
        mean and pow hold five fp32 copies at once: grad of x, of the mean, x^1, 2 x^1 and their product
        (FunctionsManual.cpp, pow_backward).
        """
        rows = x.numel // form.width
        single = x if x.element == 4 else self.op((x,), x.numel, 4)
        inverse = Tensor(rows, 4, False)
        squares = block_bytes(x.numel * 4)
        kept: tuple[Tensor, ...] = (single, inverse) if x.needs_grad else ()
        gradients = freed = 0
        if form.weight_trained:
            element = 4 if self.traits.rms_weight_in_fp32 else x.element
            kept = (*kept, normalized := Tensor(x.numel, element, False))
            freed = normalized.size_bytes  # w's gradient comes first
            gradients = block_bytes(form.width * self.recipe.base)
        out_element = x.element
        return self.op(
            (single,),
            x.numel,
            out_element,
            kept,
            weight_bytes=gradients,
            scratch_bytes=4 * squares,  # beside the input's gradient
            work_bytes=2 * squares,
            freed_bytes=freed,
            replaces=True,
        )

    def layer_norm(self, x: Tensor, form: NormForm) -> Tensor:
        """native_layer_norm keeps its input, and the mean and 1 / sigma of each row in fp32."""
        if self.traits.layernorm_in_fp32:
            single = self.cast(x, 4)
            statistics = Tensor(2 * (x.numel // form.width), 4, False)
            return self.cast(self.op((single,), x.numel, 4, (single, statistics)), x.element)
        if self.recipe.autocast:
            x = self.cast(x, 4)  # in autocast's fp32 list
        rows = x.numel // form.width
        trained = form.weight_trained + form.bias_trained
        return self.op(
            (x,),
            x.numel,
            x.element,
            (x, Tensor(rows, 4, False), Tensor(rows, 4, False)),
            weight_bytes=trained * block_bytes(form.width * self.recipe.base),
        )

    def activation(self, x: Tensor, name: str) -> Tensor:
        """Activation functions of transformers/activations.py; torch's own keep their input.

        `gelu_new` is written out and keeps x, x / 2, tanh and 1 + tanh, four times [T, f]; its power is
        fp32 under autocast, and so is what follows. relu keeps its output.
        """
        if self.traits.gelu_by_hand:  # models/bloom/modeling_bloom.py, bloom_gelu_forward and bloom_gelu_back
            size = x.size_bytes
            return self.op(
                (x,), x.numel, x.element, (x,), scratch_bytes=4 * size, work_bytes=2 * size, keeps_late=True
            )
        if name == "relu":
            return self.op((x,), x.numel, x.element, keeps_output=True)
        if name == "gelu_fast":
            return self._gelu_fast(x)
        if name != "gelu_new":
            return self.op((x,), x.numel, x.element, (x,))
        half = self.scaled(x)
        base = self.cast(x, 4) if self.recipe.autocast else x
        cubed = self.op((base,), x.numel, base.element, (base,), scratch_bytes=2 * base.size_bytes)
        inner = self.scaled(self.add(x, self.scaled(cubed)))
        tanh = self.op((inner,), x.numel, inner.element, keeps_output=True)
        return self.product(half, self.op((tanh,), x.numel, tanh.element, aliases=True))

    def gated(
        self, x: Tensor, form: LayerForm, activation: str, *, fused: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """act(gate) up, and what the model's variables hold until it is projected down.

        `fused`: gate and up are halves of one layer's output.
        """
        if fused:
            both = self.linear(x, form.mlp_inputs[0])
            gate, up = self.split(both, (both.numel // 2, both.numel // 2))
            return self.product(up, self.activation(gate, activation)), (both,)
        active = self.activation(self.linear(x, form.mlp_inputs[0]), activation)
        return self.product(active, self.linear(x, form.mlp_inputs[1])), ()

    def _gelu_fast(self, x: Tensor) -> Tensor:
        """FastGELUActivation: x / 2 (1 + tanh(c x (1 + d x x))), every factor of a product is kept."""
        half, scaled, inner = self.scaled(x), self.scaled(x), self.scaled(x)
        square = self.product(inner, x)
        bracket = self.op((square,), x.numel, square.element, aliases=True)
        tanh = self.op((self.product(scaled, bracket),), x.numel, x.element, keeps_output=True)
        return self.product(half, self.op((tanh,), x.numel, tanh.element, aliases=True))

    def turned(self, q: Tensor, k: Tensor, share: float, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
        """Rotary positions of queries and keys, whose heads they turn by `share`."""
        cats = self.traits.rotary_cats
        return self.rotary(q, share, cats=cats), self.rotary(k, share, cats=cats)

    def rotary(self, x: Tensor, share: float, *, cats: bool) -> Tensor:
        """x cos + rotate_half(x) sin. Keeps nothing of x: cos and sin are the model's, once for all layers.

        `share` of the head is turned; where the model `cats` it with the rest, that copies. Backward:
        the half-turned gradient and one spread slice live beside x's gradient.
        """
        element = 4 if self.recipe.autocast else x.element  # cos and sin have the residual stream's type
        if self.traits.rotary_halves:
            half = block_bytes(x.numel * element)
            return self.op((x,), x.numel, element, scratch_bytes=half, work_bytes=half)
        turned = int(x.numel * share)
        scratch = 2 * block_bytes(turned * element)
        if not cats:
            return self.op((x,), x.numel, element, scratch_bytes=scratch, work_bytes=scratch)
        part, rest = self.view(x, turned), self.view(x, x.numel - turned)
        return self.joined(
            (self.op((part,), turned, element, scratch_bytes=scratch, work_bytes=scratch), rest)
        )

    def joined(self, parts: tuple[Tensor, ...]) -> Tensor:
        """cat of several tensors. Keeps nothing; the gradients are views of the output's."""
        element = max([part.element for part in parts])
        return self.op(parts, sum([part.numel for part in parts]), element)
