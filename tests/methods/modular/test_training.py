"""Modular training: routes, losses, accumulation, resuming, evaluation, saving."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, Seq2SeqTrainingArguments, T5ForConditionalGeneration, TrainerCallback

from optimum_flexcompress import (
    Assembly,
    DistillationConfig,
    FlexCompressError,
    FlexCompressSeq2SeqTrainer,
    LengthAdaptiveConfig,
    ModularConfig,
    ModularModel,
    VIBPruningConfig,
    set_lengths,
)
from optimum_flexcompress.architectures import describe
from optimum_flexcompress.methods.base import PrepareContext, Step
from optimum_flexcompress.methods.modular import MODULES_NAME, ModularMethod, Piece, is_modular
from optimum_flexcompress.methods.modular.method import relative_error
from optimum_flexcompress.methods.modular.routing import Router
from tests.methods.modular.helpers import method_of, modules_of, toy, train
from tests.methods.toys import FAMILIES, arguments, assert_same, data_of, logs_of, twin, weights


CONFIG = ModularConfig(granularities=[2, 4])


class Grab(TrainerCallback):
    """Keeps the gradients of the modules in every optimizer step."""

    def __init__(self):
        self.trainer, self.gradients = None, []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.gradients.append({str(i): p.grad.clone() for i, p in enumerate(parameters) if p.grad is not None})


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


@pytest.fixture
def routes(monkeypatch):
    """The routes of every pass, as `(step, assembly)`."""
    seen = []
    original = ModularMethod.route

    def route(self, step):
        seen.append((step.global_step, original(self, step)))
        return seen[-1][1]

    monkeypatch.setattr(ModularMethod, "route", route)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_its_modules_and_nothing_else(tmp_path, family, routes):
    model, data = toy(family, dropout=0.1), data_of(family)
    before, hooks = weights(model), sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    config = ModularConfig(granularities=[2, 4], curriculum_fraction=0.0, blocks_weight=0.0)
    trainer = train(tmp_path, model, data, config, max_steps=6, learning_rate=1e-2)
    assert_same(before, weights(model))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    fresh = weights(ModularModel(model, config).modules)
    used = {f"{s}_{p.granularity}_{p.block}" for _, a in routes for s, pieces in a.stacks.items() for p in pieces}
    trained = {key.split(".")[0] for key, value in modules_of(trainer).items() if not torch.equal(value, fresh[key])}
    assert trained == {name for name in used if "_1_" not in name} and trained
    logs = [entry for entry in logs_of(trainer) if "loss_task" in entry]
    terms = {key for key in logs[0] if key.startswith(("loss_modular", "modular"))}
    stacks = list(describe(model).stacks)
    expected = {"loss_modular_logits", "modular_layers", "modular_granularity", "modular_rate"}
    expected |= {f"loss_modular_{kind}_{name}" for kind in ("hidden_states", "attention") for name in stacks}
    assert all(entry["grad_norm"] > 0 for entry in logs)
    assert terms == expected | ({"loss_modular_cross_attention"} if len(stacks) == 2 else set())
    for term in terms - {"modular_rate"}:
        assert max(entry[term] for entry in logs) > 0, term


@pytest.mark.parametrize("family", ["bert", "t5", "bart"])
def test_modules_learn_to_do_what_their_blocks_do(tmp_path, family):
    model, data = toy(family), data_of(family)
    config = ModularConfig(granularities=[2], task_loss_weight=0.0, blocks_weight=0.0, replacing_rate=1.0)
    trainer = train(tmp_path, model, data, config, max_steps=60, learning_rate=1e-2)
    logs = [entry for entry in logs_of(trainer) if "loss_modular_logits" in entry]
    for term in [key for key in logs[0] if key.startswith("loss_modular")]:
        first, last = (sum(entry[term] for entry in part) for part in (logs[:8], logs[-8:]))
        assert last < 0.5 * first, term


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_train_every_module_in_every_step(tmp_path, family):
    """Also where the task says nothing, and whatever the route is."""
    model = toy(family, dropout=0.1)
    zero = {"logits_weight": 0.0, "hidden_states_weight": 0.0, "attention_weight": 0.0, "task_loss_weight": 0.0}
    config = ModularConfig(granularities=[2, 4], **zero)
    trainer = train(tmp_path, model, data_of(family), config, max_steps=40, learning_rate=1e-2)
    fresh = weights(ModularModel(model, config).modules)
    trained = {key.split(".")[0] for key, value in modules_of(trainer).items() if not torch.equal(value, fresh[key])}
    assert trained == {key.split(".")[0] for key in fresh}
    logs = logs_of(trainer)[:-1]
    terms = [key for key in logs[0] if key.startswith("loss_modular")]
    assert terms == [f"loss_modular_blocks_{name}" for name in describe(model).stacks]
    for term in terms:
        first, last = (sum(entry[term] for entry in part) for part in (logs[:5], logs[-5:]))
        assert last < 0.7 * first, term


def test_terms_are_what_they_say():
    """Against the outputs of the models themselves, for a fixed route."""
    torch.manual_seed(0)
    model, batch = toy("t5"), dict(data_of("t5")[:4].items())
    modular = ModularModel(model, ModularConfig(granularities=[2]))
    with torch.no_grad():
        for parameter in modular.modules.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    smallest = modular.smallest()
    options = {"output_hidden_states": True, "output_attentions": True}
    small = modular.assemble(smallest)
    with torch.no_grad():
        teacher, student = model(**batch, **options), small(**batch, **options)
    valid = batch["labels"] != -100
    # The first of two: the second ends in the final norm here, which the term leaves out.
    s, t = student.decoder_hidden_states[1], teacher.decoder_hidden_states[2]
    expected = (((s - t) ** 2).sum(-1) / (t**2).sum(-1))[valid].sum()
    assert relative_error(s, t, valid).item() == pytest.approx(expected.item(), rel=1e-5)

    method = ModularMethod(ModularConfig(granularities=[2]))
    method.prepare(PrepareContext(model, None, arguments("unused")))
    method.modules.load_state_dict(modular.modules.state_dict())
    method.attach(model)
    step = Step(model, batch, 9, 10, 0, "full", 0, {})
    method.route = lambda _: smallest
    method.before_forward(step)
    step.outputs = model(**batch, output_attentions=True)
    torch.testing.assert_close(step.outputs.logits, student.logits)
    terms = method.loss_terms(step)
    method.after_pass(step)
    method.detach()

    def kl(ours, theirs, mask):
        rows = (theirs * (theirs.clamp_min(1e-38).log() - ours.clamp_min(1e-38).log())).sum(-1).mean(1)
        return sum(row[m].mean() for row, m in zip(rows, mask))

    maps = {
        "modular_attention_encoder": ("encoder_attentions", batch["attention_mask"].bool()),
        "modular_attention_decoder": ("decoder_attentions", valid),
        "modular_cross_attention": ("cross_attentions", valid),
    }
    for name, (key, mask) in maps.items():
        pairs = zip(student[key], (teacher[key][1], teacher[key][3]))
        expected = sum(kl(ours, theirs, mask) for ours, theirs in pairs) / 2
        assert terms[name].value.item() == pytest.approx(expected.item(), rel=1e-4), name
    mask = batch["labels"] != -100
    p, q = ((out.logits[mask] / 2).log_softmax(-1) for out in (teacher, student))
    assert terms["modular_logits"].value.item() == pytest.approx(4 * (p.exp() * (p - q)).sum().item(), rel=1e-4)
    # Hidden states of the last block are compared before the final norm of the stack.
    hidden = {}
    for name, other in (("student", small), ("teacher", model)):
        for stack in ("encoder", "decoder"):
            layers = getattr(other, stack).block
            for index in (0, 1) if name == "student" else (1, 3):
                key = (name, stack, index if name == "student" else index // 2)
                layers[index].register_forward_hook(lambda m, a, out, key=key: hidden.__setitem__(key, out[0]))
        with torch.no_grad():
            other(**batch)
    for stack, mask in (("encoder", batch["attention_mask"].bool()), ("decoder", valid)):
        errors = []
        for index in (0, 1):
            s, t = hidden["student", stack, index], hidden["teacher", stack, index]
            errors.append((((s - t) ** 2).sum(-1) / (t**2).sum(-1))[mask].sum())
        expected = (errors[0] + errors[1]) / 2
        assert terms[f"modular_hidden_states_{stack}"].value.item() == pytest.approx(expected.item(), rel=1e-4)
    # One module at a time in the place of its block; the layers before it are the original ones.
    view, router = describe(model), Router(describe(model))
    whole = {name: tuple(Piece(1, index) for index in range(4)) for name in ("encoder", "decoder")}
    router.attach()
    seen = {}
    for stack, mask in (("encoder", batch["attention_mask"].bool()), ("decoder", valid)):
        errors = []
        for block in (0, 1):
            layers = whole[stack]
            routed = (*layers[: 2 * block], Piece(2, block), *layers[2 * block + 2 :])
            last = view.stacks[stack].layers[2 * block + 1].module
            ends = {"student": modular.modules[f"{stack}_2_{block}"], "teacher": last}
            handles = [
                layer.register_forward_hook(lambda m, a, out, key=key: seen.__setitem__(key, out[0]))
                for key, layer in ends.items()
            ]
            for route in ({stack: modular.layers(Assembly({**whole, stack: routed}))[stack]}, {}):
                router.route = route
                with torch.no_grad():
                    model(**batch)
            for handle in handles:
                handle.remove()
            error = (seen["student"] - seen["teacher"]).square().sum(-1) / seen["teacher"].square().sum(-1)
            errors.append(error[mask].sum())
        expected = (errors[0] + errors[1]) / 2
        assert terms[f"modular_blocks_{stack}"].value.item() == pytest.approx(expected.item(), rel=1e-4)


TERMS = {
    "logits": {"logits_weight": 1.0},
    "hidden states": {"hidden_states_weight": 1.0},
    "blocks": {"blocks_weight": 1.0},
    "attention": {"attention_weight": 1.0},
}


@pytest.mark.parametrize("term", list(TERMS))
@pytest.mark.parametrize("family", ["bert", "bart", "t5"])
def test_accumulation(tmp_path, family, term):
    """1 x 8 equals 4 x 2 for each term."""
    names = ("logits_weight", "hidden_states_weight", "blocks_weight", "attention_weight", "task_loss_weight")
    zero = dict.fromkeys(names, 0.0)
    config = ModularConfig(**{"granularities": [2, 4], "replacing_rate": 0.8, **zero, **TERMS[term]})
    gradients = []
    for batch, accumulation in ((8, 1), (2, 4)):
        grab = Grab()
        train(
            tmp_path,
            toy(family),
            data_of(family, rows=8),
            config,
            callbacks=[grab],
            max_steps=1,
            max_grad_norm=0.0,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )
        gradients.append(grab.gradients[0])
    assert any(value.abs().max() > 1e-6 for value in gradients[0].values())
    assert_same(*gradients, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("family", ["bert", "t5", "bart", "gpt2"])
def test_gradient_checkpointing_changes_nothing(tmp_path, family):
    gradients = []
    for checkpointing in (False, True):
        grab, model, calls = Grab(), toy(family), []
        # The modules too are run once more in the backward pass.
        trainer_modules = ModularMethod.before_forward

        def count(self, step, original=trainer_modules, calls=calls):
            original(self, step)
            for module in self.modules.values():
                leaf = next(part for part in module.modules() if not list(part.children()))
                leaf.register_forward_pre_hook(lambda *args: calls.append(1))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ModularMethod, "before_forward", count)
            config = ModularConfig(granularities=[2, 4], replacing_rate=1.0)
            train(
                tmp_path,
                model,
                data_of(family),
                config,
                callbacks=[grab],
                max_steps=1,
                max_grad_norm=0.0,
                gradient_checkpointing=checkpointing,
            )
        gradients.append((grab.gradients[0], len(calls)))
    assert_same(gradients[0][0], gradients[1][0], atol=1e-6, rtol=1e-4)
    assert gradients[1][1] == 2 * gradients[0][1] > 0


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_killed_and_resumed_equals_not_killed(tmp_path, family, routes):
    """Dropout on, weight decay, two batches a step, originals that learn too: equal in every bit."""
    data = data_of(family, rows=20)
    config = ModularConfig(granularities=[2, 4], freeze_originals=family == "t5")
    settings = {
        "max_steps": 7,
        "save_strategy": "steps",
        "save_steps": 3,
        "gradient_accumulation_steps": 2,
        "weight_decay": 0.1,
        "warmup_steps": 2,
    }
    model = toy(family, dropout=0.1)
    whole = train(tmp_path / "whole", twin(model), data, config, **settings)
    expected = [entry for entry in routes if entry[0] >= 3]
    assert len({str(assembly) for _, assembly in routes}) > 2
    with pytest.raises(Killed):
        train(tmp_path / "killed", twin(model), data, config, callbacks=[KillAt(5)], **settings)
    routes.clear()
    stranger = toy(family, dropout=0.1, seed=9)
    resumed = train(tmp_path / "killed", stranger, data, config, resume=True, **settings)
    assert routes == expected
    assert_same(weights(whole.model), weights(resumed.model))
    assert_same(modules_of(whole), modules_of(resumed))
    assert logs_of(whole)[3:7] == logs_of(resumed)[3:7]


def test_evaluation_and_generation_run_the_chosen_assembly(tmp_path):
    """Metrics during training are those of the assembled model; afterwards the model is the full one again."""
    model, data = toy("t5"), data_of("t5")
    args = Seq2SeqTrainingArguments(
        **{
            **arguments(tmp_path).to_dict(),
            "max_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "predict_with_generate": True,
            "generation_max_length": 6,
            "generation_num_beams": 2,
        }
    )
    config = ModularConfig(granularities=[2, 4], evaluated_ratio=2.0)
    seen = []

    class Look(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            seen.append(metrics["eval_loss"])

    trainer = train(
        tmp_path,
        model,
        data,
        config,
        args=args,
        eval_dataset=data,
        callbacks=[Look()],
        trainer_class=FlexCompressSeq2SeqTrainer,
    )
    modular = method_of(trainer)._modular
    small = modular.assemble(modular.choose("size-first", 2.0)).eval()
    losses = []
    for other in (small, model.eval()):
        with torch.no_grad():
            batches = [other(**dict(data[start : start + 8].items())).loss for start in (0, 8)]
        losses.append(torch.stack(batches).mean().item())
    assert seen == [pytest.approx(losses[0], rel=1e-4)]
    assert abs(losses[0] - losses[1]) > 1e-3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[1], rel=1e-4)


def test_saved_models_and_checkpoints_can_be_assembled(tmp_path):
    model, data = toy("bart"), data_of("bart")
    trainer = train(tmp_path / "run", model, data, CONFIG, max_steps=3, save_strategy="steps", save_steps=3)
    trainer.save_model(tmp_path / "out")
    assert (tmp_path / "out" / MODULES_NAME).is_file()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "flexcompress assemble" in card and "- decoder: 4 layers, granularities 2, 4" in card
    batch = dict(data[:4].items())
    expected = method_of(trainer)._modular
    assembly = expected.smallest()
    logits = expected.assemble(assembly).eval()(**batch).logits
    for folder in (tmp_path / "out", tmp_path / "run" / "checkpoint-3"):
        modular = ModularModel.from_pretrained(folder)
        assert torch.equal(modular.assemble(assembly)(**batch).logits, logits)
        assert torch.equal(modular.model(**batch).logits, model.eval()(**batch).logits)
        assert is_modular(folder)
    with pytest.raises(
        FlexCompressError,
        match=r"granularities 2, 4 \(decoder\) and 2, 4 \(encoder\), this run asks for 2 \(decoder\)",
    ):
        train(tmp_path / "run", toy("bart"), data, ModularConfig(granularities=[2]), resume=True, max_steps=4)
    state = tmp_path / "run" / "checkpoint-3" / "flexcompress_state.pt"
    whole = state.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"no archive"):
        state.write_bytes(damaged)
        with pytest.raises(FlexCompressError, match="flexcompress_state.pt is damaged"):
            ModularModel.from_pretrained(state.parent)


def test_bart_skips_no_layers_while_it_is_routed(tmp_path):
    model = toy("bart")
    model.model.encoder.layerdrop = model.model.decoder.layerdrop = 0.9
    seen = []
    for stack in describe(model).stacks.values():
        for layer in stack.layers:
            layer.module.register_forward_hook(lambda *args: seen.append(model.training))
    config = ModularConfig(granularities=[4], freeze_originals=False, replacing_rate=0.0, replacing_fraction=1.0)
    train(tmp_path, model, data_of("bart"), config, max_steps=2)
    # Of each step eight layers in the teacher's pass, and those that the route has kept.
    assert seen.count(False) == 16
    assert model.model.encoder.layerdrop == model.model.decoder.layerdrop == 0.9


def test_theseus_trains_on_the_task_alone(tmp_path, routes):
    model, data = toy("bert"), data_of("bert")
    config = ModularConfig.theseus(2, replacing_rate=0.5)
    trainer = train(tmp_path, model, data, config, max_steps=10)
    names = {name for entry in logs_of(trainer) for name in entry if name.startswith("loss_")}
    assert names == {"loss_task"}
    assert {piece.granularity for _, a in routes for piece in a.stacks["encoder"]} == {1, 2}
    assert all(a.layers == 2 for step, a in routes if step >= 6)
    assert not trainer._runner._needs.attentions


@pytest.mark.parametrize("strategy", ["size-first", "speed-first"])
def test_named_ratios_are_what_the_last_steps_train(tmp_path, routes, strategy):
    model, data = toy("bart"), data_of("bart")
    config = ModularConfig(
        granularities=[2, 4], ratios=[1.3, 1.35, 2, 4], ratios_strategy=strategy, ratios_fraction=0.5
    )
    trainer = train(tmp_path, model, data, config, max_steps=40)
    modular = method_of(trainer)._modular
    wanted = [modular.choose(strategy, ratio) for ratio in (1.35, 2, 4)]
    assert modular.choose(strategy, 1.3) == wanted[0]
    assert all(any(a == assembly for _, a in routes[20:]) for assembly in wanted)
    assert all(a in wanted for _, a in routes[20:]) and not all(a in wanted for _, a in routes[:20])
    last = [entry for entry in logs_of(trainer) if "modular_rate" in entry][20:]
    assert len(last) == 20 and all(entry["modular_rate"] == 1.0 for entry in last)
    trainer.save_model(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"trained above all for {strategy} assemblies of the ratios 1.3, 1.35, 2, 4" in card


def test_logits_of_another_teacher_may_be_distilled_too(tmp_path):
    teacher = toy("bert", layers=5, seed=3)
    trainer = train(tmp_path, toy("bert"), data_of("bert"), CONFIG, DistillationConfig(), teacher_model=teacher)
    names = {name for entry in logs_of(trainer) for name in entry}
    assert {"loss_logits", "loss_modular_logits"} <= names


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"granularities": [3, 5]}, r"The encoder has 4 layers, which no granularity of 3, 5 divides .* \(2, 4\)"),
        ({"granularities": [3]}, r"give granularities that do \(2, 4\)\.$"),
        ({"granularities": [2], "stacks": ["decoder"]}, 'names the stack "decoder", which BertFor'),
        ({"granularities": [2], "evaluated_ratio": 3.0}, r"ratio of 3 is out of reach.* nearest is 2\."),
        ({"granularities": [2], "ratios": [2, 3]}, r"ratio of 3 is out of reach.* nearest is 2\."),
        (
            {"granularities": [2], "ratios": [2], "ratios_strategy": "speed-first"},
            "speed-first takes from the decoder",
        ),
        (
            {"granularities": [2], "ratios": [1.05, 2]},
            r"1\.05 in modular.ratios is the full model .* at least 1\.333\.",
        ),
    ],
)
def test_settings_that_do_not_fit_the_model(tmp_path, settings, message):
    with pytest.raises(FlexCompressError, match=message):
        train(tmp_path, toy("bert"), data_of("bert"), ModularConfig(**settings))


def test_one_stack_may_be_left_out(tmp_path):
    model = toy("t5")
    model.config.num_decoder_layers = 1
    shallow = type(model)(model.config)
    with pytest.raises(FlexCompressError, match=r"The decoder has 1 layer, .* stacks=\[\"encoder\"\]"):
        train(tmp_path, shallow, data_of("t5"), CONFIG)
    trainer = train(tmp_path, shallow, data_of("t5"), ModularConfig(granularities=[2], stacks=["encoder"]))
    assert all(name.startswith("encoder_2_") for name in modules_of(trainer))
    assert method_of(trainer)._modular.smallest().ratio == pytest.approx(5 / 3)


def test_modules_that_would_leave_a_deeper_decoder_give_no_model(tmp_path):
    """Transformers could not generate with any assembly of them, which is said before the training."""
    encoder = ModularConfig(granularities=[2], stacks=["encoder"])
    with pytest.raises(FlexCompressError, match=r"A t5 model cannot .* encoder alone give no model.* divide 4\)"):
        train(tmp_path, toy("t5"), data_of("t5"), encoder)
    train(tmp_path, toy("bart"), data_of("bart"), encoder, max_steps=1)
    config = toy("t5").config
    config.num_layers, config.num_decoder_layers = 4, 3
    with pytest.raises(FlexCompressError, match=r"The decoder has 3 layers, [^\[]*\(3\)\.$"):
        train(tmp_path, T5ForConditionalGeneration(config), data_of("t5"), ModularConfig(granularities=[2]))


def test_models_and_methods_that_do_not_go_together(tmp_path):
    data = data_of("bert")
    with pytest.raises(FlexCompressError, match="learn from the original layers of the same model"):
        train(tmp_path, toy("bert"), data, CONFIG, teacher_model=toy("bert", layers=5))
    with pytest.raises(FlexCompressError, match="which vib_pruning cannot follow"):
        train(tmp_path, toy("bert"), data, CONFIG, VIBPruningConfig(target_sparsity=0.5))
    with pytest.raises(FlexCompressError, match="which length_adaptive cannot follow"):
        train(tmp_path, toy("bert"), data, CONFIG, LengthAdaptiveConfig())
    layered = DistillationConfig(hidden_states_weight=1.0)
    with pytest.raises(FlexCompressError, match="which distillation cannot follow"):
        train(tmp_path, toy("bert"), data, CONFIG, layered, teacher_model=toy("bert", layers=5))
    with pytest.raises(FlexCompressError, match="drops tokens"):
        train(tmp_path, set_lengths(toy("bert"), [0.9, 0.8, 0.7, 0.6]), data, CONFIG)
    with pytest.raises(FlexCompressError, match="no head whose logits"):
        train(tmp_path, toy("bert", auto_class=AutoModel), data, CONFIG)
    gpt2 = toy("gpt2")
    gpt2.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(FlexCompressError, match="scales attention by the number of its layer"):
        train(tmp_path, gpt2, data_of("gpt2"), CONFIG)


def test_memory_grows_by_the_modules_alone(tmp_path):
    """No second model, no optimizer state for originals: of four layers three more with granularities 2 and 4."""
    model = toy("t5")
    layers = [weights(layer.module) for stack in describe(model).stacks.values() for layer in stack.layers[1:2]]
    trainer = train(tmp_path, model, data_of("t5"), CONFIG, max_steps=4)
    modules = list(method_of(trainer).modules.parameters())
    assert sum(p.numel() for p in modules) == 3 * sum(value.numel() for layer in layers for value in layer.values())
    assert {id(p) for p in trainer.optimizer.state} <= {id(p) for p in modules}
    assert len(trainer.optimizer.state) > 0
    assert method_of(trainer)._teacher.model is model
