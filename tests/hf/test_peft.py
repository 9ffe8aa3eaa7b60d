"""LoRA on packed weights: trained, saved, loaded again."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from bitlm.modules import packed_weights
from tests import zoo


@pytest.mark.parametrize("name", ["llama", "mixtral", "bert", "t5_relu"])
def test_lora(name, tmp_path):
    zoo.packed(name, "ternary").save_pretrained(tmp_path / "base")
    base = zoo.auto_class(name).from_pretrained(tmp_path / "base")
    before = {k: v.clone() for k, v in base.state_dict().items()}
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear",
                                            init_lora_weights=False))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and not any(p.requires_grad for w in packed_weights(model).values()
                               for p in w.parameters())
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses = []
    for _ in range(3):
        loss = model(**zoo.inputs(name)).logits.float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    model.save_pretrained(tmp_path / "adapter")
    again = zoo.auto_class(name).from_pretrained(tmp_path / "base")
    assert {k for k, v in again.state_dict().items() if not torch.equal(v, before[k])} == set()
    again = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(again(**zoo.inputs(name)).logits, model(**zoo.inputs(name)).logits)


def test_transformers_own_trainer_takes_it(tmp_path):
    from transformers import Trainer, TrainingArguments

    zoo.packed("llama").save_pretrained(tmp_path / "base")
    base = zoo.auto_class("llama").from_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(base, TrainingArguments(tmp_path, report_to=[]))
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear",
                                            task_type="CAUSAL_LM"))
    ids = zoo.inputs("llama")["input_ids"]
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(tmp_path / "run", max_steps=2, report_to=[], use_cpu=True,
                                  save_strategy="no", disable_tqdm=True)
    assert Trainer(model, arguments, train_dataset=data).train().global_step == 2
