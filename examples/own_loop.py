"""A training loop of one's own: AdamW takes the step, Alpha MAML gives the meta-gradient and adapts both rates."""
import torch
from torch import nn

import alpha_maml


def sinusoid(split: str, number: int):
    """Task number `number`: five points of a wave to adapt to, ten to be tested on."""
    generator = torch.Generator().manual_seed(number + {"train": 0, "test": 10**9}[split])
    amplitude, phase = 0.1 + 4.9 * torch.rand(1, generator=generator), 3.14 * torch.rand(1, generator=generator)
    x = 10 * torch.rand(15, 1, generator=generator) - 5
    y = amplitude * torch.sin(x - phase)
    return (x[:5], y[:5]), (x[5:], y[5:])


torch.manual_seed(0)
net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
optimizer = torch.optim.AdamW(net.parameters(), weight_decay=1e-4)
wrapped = alpha_maml.wrap(net, optimizer=optimizer, config={"rates.alpha": 0.01, "rates.beta": 1e-3})

for iteration in range(600):
    optimizer.zero_grad()
    metrics = wrapped.backward([sinusoid("train", 8 * iteration + b) for b in range(8)])
    optimizer.step()
    if iteration % 100 == 99:
        print(f"{iteration + 1:4}  loss {metrics['loss']:.3f}  alpha {metrics['alpha']:.4f}  beta {metrics['beta']:.4f}")

losses = []
for number in range(100):
    support, (x, y) = sinusoid("test", number)
    losses.append(float(nn.functional.mse_loss(wrapped.adapt(support, steps=5)((x, y)), y)))
print(f"test loss after five steps: {sum(losses) / len(losses):.3f}")
assert sum(losses) / len(losses) < 3.5, "an unadapted network has about 4.5"
