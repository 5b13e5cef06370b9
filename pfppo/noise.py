"""A laboratory for reward models that are wrong in known places: `--reward noisy:middle`, `:tails`,
`:uniform`.

The paper says that a reward model is least reliable where it is lukewarm. Here the place of the
errors is chosen, and everything else is equal. A response has a latent reward z that ranks
perfectly: its sign is the actual score's (passed or not), its size |n| says how clear the case is,
n standard normal. What PPO sees is z, or -z where the reward model errs, which it does with

    uniform    p = e
    middle     p = e a exp(-z^2)            often where z is near 0
    tails      p = e b (1 - exp(-z^2))      often where |z| is large

a = sqrt 3 and b = 1 / (1 - 1 / sqrt 3), so that all three err on a share e = 0.2 of the responses
and differ in where. The errors belong to a prompt and a response: equal responses have equal
rewards, as with a reward model, and another seed is another reward model.

Noise that is *added* to z, as large where z is small, would be another laboratory: it carries
lukewarm cases into the extremes of what is seen, so that what is seen errs there.

Not covered: errors that depend on the text (length, style), which a policy could learn to exploit.
"""

import hashlib

import torch

ERRORS = 0.2  # share of the responses whose reward has the wrong sign
PLACES = {  # error rates at latent rewards z, relative to their mean
    "uniform": torch.ones_like,
    "middle": lambda z: 3**0.5 * torch.exp(-(z**2)),  # E exp(-z^2) = 1 / sqrt 3
    "tails": lambda z: (1 - torch.exp(-(z**2))) / (1 - 3**-0.5),
}


def noisy_rewards(place, scores, prompts, responses, seed):
    """Rewards [B] of responses with actual scores [B] (0 or 1), with errors where `place` says."""
    drawn = [_draw(seed, *pair) for pair in zip(prompts, responses, strict=True)]
    size, luck = (torch.tensor(column) for column in zip(*drawn, strict=True))
    latent = torch.where(scores > 0.5, size, -size)
    return torch.where(luck < ERRORS * PLACES[place](latent), -latent, latent)


def _draw(seed, prompt, response):
    """(|n|, a number in [0, 1)) that belong to this prompt and response."""
    key = hashlib.blake2b(f"{seed}\0{prompt}\0{response}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "big"))
    return abs(torch.randn((), generator=generator).item()), torch.rand(
        (), generator=generator
    ).item()
