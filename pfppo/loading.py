"""From a folder to sharded networks: policy and frozen reference, reward model and critic.

The reference is the SFT policy, frozen. The critic starts from the reward model, head included, or
where there is none from the policy's backbone with a new head.
"""

from pfppo.data import load_tokenizer, template_hash, vocabulary_hash
from pfppo.fsdp import agreed, compute_dtype, shard
from pfppo.model import (
    Policy,
    ScalarModel,
    classifier_from_causal_lm,
    empty_causal_lm,
    empty_classifier,
    read_causal_lm,
    read_classifier,
    read_config,
    read_generation_config,
)
from pfppo.reward import RewardCard, check_agreement, load_card


def load_policies(path, ranks, param_dtype):
    """(policy, reference, twin): trainable, frozen, and the empty copy that sampling fills."""
    config = read_config(path, "policy")
    with agreed(ranks):
        full = Policy(read_causal_lm(path)) if ranks.is_main else None
    policy, reference = (
        shard(Policy(empty_causal_lm(config)), full, ranks, param_dtype, trainable)
        for trainable in (True, False)
    )
    twin = empty_causal_lm(config, compute_dtype(param_dtype, ranks))
    # What is exported stops where the SFT policy stops.
    twin.generation_config = read_generation_config(path) or twin.generation_config
    return policy, reference, twin


def load_scalars(args, tokenizer, ranks, critic=True):
    """(reward model, critic, whether the normaliser is known), both from --reward_model.

    An RM from elsewhere has no card: vocabulary and chat template are those of its tokenizer, its
    normaliser is 0 and 1 until somebody measures it. Without --reward_model: (None, critic on the
    policy's backbone with a new head, True). Raises UserError if RM and policy do not fit.
    """
    path, style = args.reward_model, args.prompt_style
    if not path and not critic:
        return None, None, True
    if not path:
        return None, new_scalar(args.policy, args.seed, ranks, args.param_dtype), True
    template, vocabulary = template_hash(tokenizer, style), vocabulary_hash(tokenizer)
    config, card = read_config(path, "reward_model"), load_card(path)
    known = card is not None
    if not known:
        theirs = load_tokenizer(path, "reward_model")
        card = RewardCard(0.0, 1.0, template_hash(theirs, style), vocabulary_hash(theirs))
        if config.pad_token_id == theirs.eos_token_id:
            ranks.say(
                f"--reward_model {path}: it pads with its end-of-sequence token, so transformers "
                "would read the score one token before it; here it is read there"
            )
    check_agreement(card, template, vocabulary, path, args.policy)
    with agreed(ranks):
        full = ScalarModel(read_classifier(path)) if ranks.is_main else None
    scalars = [
        shard(
            ScalarModel(empty_classifier(config), card.mean, card.std),
            full,
            ranks,
            args.param_dtype,
            trainable,
        )
        for trainable in ((False, True) if critic else (False,))
    ]
    return scalars[0], scalars[-1], known


def new_scalar(path, seed, ranks, param_dtype):
    """A trainable scalar model on the policy's backbone with a new head: RM before training."""
    config = read_config(path, "policy")
    with agreed(ranks):
        full = ScalarModel(classifier_from_causal_lm(path, seed)) if ranks.is_main else None
    return shard(ScalarModel(empty_classifier(config)), full, ranks, param_dtype)
