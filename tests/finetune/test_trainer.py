"""Training, against peft + transformers."""
from __future__ import annotations
from mistral_ext.finetune import Trainer

def test_smoke(llm, write_lines, tmp_path):
    data = write_lines("t.jsonl", *[{"messages":[{"role":"user","content":f"What comes after {i} in this list of numbers?"},{"role":"assistant","content":f"{i+1}"}]} for i in range(12)])
    r = Trainer(llm, data, tmp_path/"out", data, batch_size=4, tokens_per_pass=64, epochs=2, learning_rate=1e-2).train()
    print(r)
    print((tmp_path/"out"/"metrics.jsonl").read_text())
    import os; print(os.listdir(tmp_path/"out"), os.listdir(tmp_path/"out"/"checkpoint-000006"))
    llm.load_adapter(tmp_path/"out","x")
    import peft
    assert 0
