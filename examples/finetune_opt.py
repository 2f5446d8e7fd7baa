"""Fine-tune a Hugging Face OPT inside a device budget: two lines differ from plain PyTorch.

python examples/finetune_opt.py
"""

import geminifx
import torch
from transformers import OPTConfig, OPTForCausalLM

torch.manual_seed(0)
config = OPTConfig(vocab_size=1000, hidden_size=128, ffn_dim=512, num_hidden_layers=4, num_attention_heads=4,
                   word_embed_proj_dim=128, max_position_embeddings=256)  # fmt: skip
model = OPTForCausalLM(config)
tokens = torch.randint(0, config.vocab_size, (8, 128))
batch = {"input_ids": tokens, "labels": tokens}

# On a GPU: device_budget="24GB", and leave `device` out.
model = geminifx.compile(model, device_budget="24MB", device="cpu", example_inputs=batch)
print(model.plan)

# Any torch.optim optimizer over model.parameters() works too; this one updates while the model computes.
optimizer = model.optimizer(torch.optim.AdamW, lr=1e-3, max_grad_norm=1.0)
for step in range(10):
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}, device peak {model.stats.device_peak_bytes:,} bytes")

model.save_pretrained("runs/example")
