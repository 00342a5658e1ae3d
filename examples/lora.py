"""LoRA on a small language model that this program trains itself; each module of Python's standard library is a task."""
import sysconfig
from pathlib import Path

import peft
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import alpha_maml

LENGTH, LIBRARY = 64, Path(sysconfig.get_path("stdlib"))
TEXTS = [t for t in (path.read_bytes() for path in sorted(LIBRARY.glob("*.py"))) if len(t) > 12 * LENGTH][:90]
SPLITS = {"train": TEXTS[:60], "val": TEXTS[60:75], "test": TEXTS[75:]}


def lines(text: bytes, count: int, seed: int) -> torch.Tensor:
    """So many pieces of a text, as bytes."""
    starts = torch.randint(len(text) - LENGTH, (count,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([torch.frombuffer(bytearray(text[s : s + LENGTH]), dtype=torch.uint8) for s in starts.tolist()]).long()


def module(split: str, number: int):
    """Task: to continue the text of one module."""
    ids = lines(SPLITS[split][number % len(SPLITS[split])], 16, number)
    return {"input_ids": ids[:8], "labels": ids[:8]}, {"input_ids": ids[8:], "labels": ids[8:]}


torch.manual_seed(0)
base = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=LENGTH, n_embd=48, n_layer=2, n_head=4, resid_pdrop=0.0,
                                  embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, attn_implementation="eager"))
optimizer = torch.optim.AdamW(base.parameters(), lr=3e-3)
for step in range(150):  # the pretraining that a real run would download
    ids = torch.cat([lines(TEXTS[(4 * step + i) % 60], 4, step) for i in range(4)])
    loss = base(input_ids=ids, labels=ids).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"pretrained to a loss of {float(loss):.2f}")

lora = peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
run = alpha_maml.train(peft.get_peft_model(base, lora), module, loss="next_token", run_dir="runs/lora",
                       config={"iterations": 60, "task.batch": 4, "evaluation.tasks": 15, "inner.steps": 2})
curve = run.evaluate(tasks=15)["curve"]
print("loss after 0, 1, 2 inner steps:", *(f"{x:.3f}" for x in curve["loss"]))
assert curve["loss"][-1] < curve["loss"][0]
