"""From a folder to sharded networks: policy and frozen reference, reward model and critic.

The reference is the SFT policy, frozen. The critic starts from the reward model, head included, or
where there is none from the policy's backbone with a new head.
"""

from pfppo.config import UserError, is_hub_id, reason
from pfppo.data import load_tokenizer, template_hash, vocabulary_hash
from pfppo.fsdp import agreed, compute_dtype, shard
from pfppo.model import (
    Policy,
    ScalarModel,
    causal_lm_config,
    classifier_config,
    classifier_from_causal_lm,
    empty_causal_lm,
    empty_classifier,
    new_head,
    read_causal_lm,
    read_classifier,
    read_config,
    read_generation_config,
)
from pfppo.reward import RewardCard, check_agreement, load_card
from pfppo.weights import source_of

from huggingface_hub import snapshot_download

# Files of a model on the Hub that nothing here reads: other formats of the same weights.
UNREAD = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "original/*")


def fetch(args, names, ranks):
    """Replace Hub ids (owner/name) among the arguments `names` by folders of the local cache.

    On each node its first rank downloads what the cache lacks. Raises UserError where it cannot.
    """
    for name in names:
        path = getattr(args, name, "")
        if not is_hub_id(path):
            continue
        for turn in (ranks.local == 0, ranks.local != 0):
            with agreed(ranks):
                try:
                    if turn:
                        setattr(args, name, snapshot_download(path, ignore_patterns=UNREAD))
                except Exception as error:  # no network, no such model, no permission, ...
                    raise UserError(
                        f"--{name} {path}: there is no such folder, and the Hugging Face Hub did "
                        f"not give it: {reason(error)}"
                    ) from error


def _source(empty, path, option, read, ranks, new=None):
    """`source_of`, with the whole model read on rank 0 only, and failures told on all ranks."""

    def read_whole():
        return read() if ranks.is_main else None

    with agreed(ranks):
        return source_of(empty, path, option, read_whole, new)


def load_policies(path, ranks, param_dtype, offload_ref=False, offload_optimizer=False):
    """(policy, reference, twin): trainable, frozen, and the empty copy that sampling fills."""
    config = causal_lm_config(path)
    empty = Policy(empty_causal_lm(config))
    source = _source(empty, path, "policy", lambda: Policy(read_causal_lm(path)), ranks)
    policy = shard(empty, source, ranks, param_dtype, True, offload_optimizer)
    empty = Policy(empty_causal_lm(config))
    reference = shard(empty, source, ranks, param_dtype, False, offload_ref)
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
    offloads = {
        trainable: getattr(args, name, False)
        for trainable, name in ((False, "offload_reward"), (True, "offload_optimizer"))
    }
    if not path and not critic:
        return None, None, True
    if not path:
        return (
            None,
            new_scalar(args.policy, args.seed, ranks, args.param_dtype, offloads[True]),
            True,
        )
    template, vocabulary = template_hash(tokenizer, style), vocabulary_hash(tokenizer)
    config, card = classifier_config(path), load_card(path)
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
    scalars, source = [], None
    for trainable in (False, True) if critic else (False,):
        empty = ScalarModel(empty_classifier(config), card.mean, card.std)
        source = source or _source(
            empty, path, "reward_model", lambda: ScalarModel(read_classifier(path)), ranks
        )
        scalars.append(
            shard(empty, source, ranks, args.param_dtype, trainable, offloads[trainable])
        )
    return scalars[0], scalars[-1], known


def new_scalar(path, seed, ranks, param_dtype, offload=False):
    """A trainable scalar model on the policy's backbone with a new head: RM before training."""
    empty = ScalarModel(empty_classifier(read_config(path, "policy")))
    new = {f"classifier.{name}": value for name, value in new_head(empty.classifier, seed).items()}
    source = _source(
        empty,
        path,
        "policy",
        lambda: ScalarModel(classifier_from_causal_lm(path, seed)),
        ranks,
        new,
    )
    return shard(empty, source, ranks, param_dtype, True, offload)
