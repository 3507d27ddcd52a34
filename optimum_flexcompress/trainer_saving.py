"""What a trainer that compresses saves and pushes: finished models with their cards."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from huggingface_hub.repocard_data import model_index_to_eval_results
from transformers.modelcard import TrainingSummary, make_markdown_table

from .hub import explained_push, repo_name
from .methods.teacher import unwrap_peft
from .model_card import write_model_card


class SavingMixin:
    """The part of [`FlexCompressMixin`](optimum_flexcompress.trainer.FlexCompressMixin) that writes models.

    Checkpoints keep what training goes on with; what the user saves, and what is pushed at the end, is the finished
    model.
    """

    # Arguments for the card, while a push is under way.
    _pushed_card: Mapping[str, Any] | None = None

    def save_model(self, output_dir=None, _internal_call=False):
        runner = self._runner
        if runner is None:
            return super().save_model(output_dir, _internal_call)
        if runner.prepared_for is not None:
            runner.check()
        # A push saves to the folder of the run, a checkpoint to one of its own.
        if _internal_call and output_dir is not None:
            super().save_model(output_dir, _internal_call)
            if self.args.should_save and runner.prepared_for is not None:
                runner.save(output_dir)
            return None
        self._save_finished(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_finished(self, output_dir: str | None) -> None:
        runner, model = self._runner, self.model
        if not (runner.restructures and self.is_in_train):
            super().save_model(output_dir, _internal_call=True)
            self._write_beside(output_dir)
            return
        # Asked for in the middle of training, which goes on with the model as it is: without its hooks, which would
        # drag the teacher along.
        runner.detach()
        try:
            self.model = runner.finalize(copy.deepcopy(model))
            super().save_model(output_dir, _internal_call=True)
            self._write_beside(output_dir)
        finally:
            self.model = model
            runner.attach()

    def _write_beside(self, folder: str | None, card: Mapping[str, Any] | None = None) -> None:
        """Writes the model card, and what the methods put beside a model.

        Args:
            folder: The folder; that of the run when `None`.
            card: Arguments of `create_model_card`; None for a card without a word on the training.
        """
        if not self.args.should_save:
            return
        folder = folder if folder is not None else self.args.output_dir
        card = card if card is not None else self._pushed_card
        lines, metadata, name = [], {}, None
        if card is not None:
            # Its own search for the base model would take local folders for models on the Hub.
            summary = TrainingSummary.from_trainer(self, **{"finetuned_from": "", **card})
            lines, metadata, name = _training_lines(summary), _metadata(summary), self.hub_model_id
        if self._runner.prepared_for is not None:
            for method in self._runner.methods:
                method.save_beside(folder)
                lines = method.card_lines() + lines
        saved = unwrap_peft(self.model)
        write_model_card(
            folder,
            saved,
            methods=[method.method_type for method in self.compression_config.methods],
            base_model=(card or {}).get("finetuned_from") or saved.config._name_or_path,
            lines=lines,
            name=name,
            metadata=metadata,
        )

    # The Hub

    def init_hf_repo(self, token=None):
        if self.compression_config is None:
            return super().init_hf_repo(token)
        with explained_push(repo_name(self.args.hub_model_id, self.args.output_dir)):
            return super().init_hf_repo(token)

    def create_model_card(self, **kwargs):
        if self._runner is None:
            return super().create_model_card(**kwargs)
        # In a push the model has just been saved, together with its card.
        if self._pushed_card is None and self.is_world_process_zero():
            self._write_beside(self.args.output_dir, kwargs)

    def push_to_hub(self, commit_message="End of training", blocking=True, token=None, revision=None, **kwargs):
        if self._runner is None:
            return super().push_to_hub(commit_message, blocking, token, revision, **kwargs)
        self._pushed_card = kwargs
        folder = self.args.output_dir
        repo = self.hub_model_id or repo_name(self.args.hub_model_id, folder)
        try:
            with explained_push(repo, folder):
                return super().push_to_hub(commit_message, blocking, token, revision, **kwargs)
        finally:
            self._pushed_card = None


def _metadata(summary: TrainingSummary) -> dict[str, Any]:
    """Of the Hub, as the stock trainer writes them; the card itself knows better what the model is."""
    known = {**summary.create_metadata(), "license": summary.license}
    results = known.pop("model-index")[0]["results"]
    if results:
        known["eval_results"] = model_index_to_eval_results([{"name": summary.model_name, "results": results}])[1]
    return {name: value for name, value in known.items() if value}


def _training_lines(summary: TrainingSummary) -> list[str]:
    """The training in the words of the stock trainer's card, as Markdown."""
    lines = ["## Training", ""]
    if summary.eval_results:
        results = [
            f"- {name}: {value:.4g}" for name, value in summary.eval_results.items() if isinstance(value, float)
        ]
        lines += ["On the evaluation set:", "", *results, ""]
    lines += ["Hyperparameters:", "", *(f"- {name}: {value}" for name, value in summary.hyperparameters.items())]
    if summary.eval_lines:
        lines += ["", *make_markdown_table(summary.eval_lines).splitlines()]
    return lines
