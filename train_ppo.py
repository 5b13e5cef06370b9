"""PF-PPO: Policy Filtration for PPO (arXiv 2409.06957), on one page.

    torchrun train_ppo.py --filter best_random                       # the lab, from nothing
    torchrun --nproc_per_node 8 train_ppo.py --policy DIR --reward_model DIR --prompts FILE

Each step:
    1. sample      N responses to each of P prompts from the policy pi
    2. score       by the reward model (and by --verify, where it can tell, only to watch)
    3. FILTER      rewards [P, N] -> weights [P, N]: what is kept is a sample of mu
    4. evaluate    log-probs of policy and reference, values of the critic: survivors only
    5. advantages  -beta (log pi - log ref) per token, + reward at the last one; GAE; whitening
    6. update      clipped PPO losses of actor and critic

Without step 3 this is PPO. Not covered: asynchronous sampling, several turns, adapters.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import train_rm
from pfppo import data, filters, fsdp, lab, loading, ppo, reward, rollout, run, sampler
from pfppo.answers import Examiner
from pfppo.config import Count, Natural, NonNegative, Positive, Seed, Share
from pfppo.metrics import Meter

import torch


@dataclass
class Args(run.LongRun):  # and options that change no number: pfppo/run/options.py
    # What there is
    policy: str = "lab"  # SFT policy to start from: a folder, a Hub id, or "lab" (then made)
    reward_model: str = "lab"  # and start of the critic: likewise, or "" (none), or several: A,B,C
    prompts: str = "lab"  # JSONL of problems (HumanEval, MBPP, ..., or prompts alone), or "lab"
    validation: str = "auto"  # problems that choose the policy; auto: the lab's with its prompts
    test: str = "auto"  # problems of the final table; auto: the lab's with its prompts
    prompt_style: run.styles("plain", "chat", "deepseek") = "plain"  # as code, or as a dialogue
    max_prompt_tokens: Count = 1024  # longest prompt; longer ones are left out
    timeout: Positive = 3.0  # CPU seconds that one sample's tests may take
    verify: str = "tests"  # what is right: tests, last_number (= `answer`), file.py:function
    param_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on GPU
    seed: Seed = 1  # order of prompts, samples, filter
    steps: Count = 30  # PPO steps
    eval_every: Count = 5  # steps between looks at validation
    # 1. Sample
    prompts_per_step: Count = 48  # P
    samples_per_prompt: Count = 5  # N
    max_new_tokens: Count = 64  # longest response
    temperature: Positive = 1.0  # of sampling, and of all log-probs
    refill: Natural = 0  # further rounds of prompts at most, until P prompts have weight
    # 2. Score
    reward: str = "model"  # name in REWARDS, module:function or file.py:function
    reward_scale: Literal["sft", "none"] = "sft"  # mean 0, sd 1 over the SFT policy's samples
    reward_clip: Positive = 10.0  # limit of the normalised reward
    missing_eos_penalty: NonNegative = 0.0  # taken off the reward of a truncated response
    # 3. FILTER
    filter: str = "best_random"  # name in FILTERS, module:function or file.py:function
    # 5. Advantages
    kl_coef: NonNegative = 0.2  # beta; the paper: 0.01 at 6.7B
    kl_target: NonNegative = 0.0  # nats per response that beta is adapted to; 0: beta is fixed
    gamma: Share = 1.0  # discount
    lam: Share = 0.95  # lambda of GAE
    # 6. Update
    minibatch: Count = 48  # kept rows per optimizer step, over all ranks
    microbatch: Count = 48  # rows per forward and rank; memory only, changes no number
    ppo_epochs: Count = 1  # times that each kept row is used
    clip: Positive = 0.2  # of the ratio
    value_clip: Positive = 0.2  # of the change of a value
    loss_aggregation: Literal["sequence_mean", "token_mean"] = "sequence_mean"  # what counts alike
    actor_lr: Positive = 2e-4  # AdamW (.9, .95); the paper: 5e-7 at 6.7B
    critic_lr: Positive = 5e-4  # AdamW (.9, .95); the paper: 9e-6 at 6.7B
    grad_norm: Positive = 1.0  # global norm that gradients are clipped to
    warmup: Share = 0.03  # share of the steps, and one, in which learning rates rise
    FREE = ("steps", "eval_every", "microbatch")  # may differ on --resume, as what is inherited


def log_probs(policy, rows, args):
    """Log-probs of the responses and entropy, [B, T]: old, new and reference ones."""
    return policy(rows.ids, rows.states, rows.responses, rows.mask, args.temperature)


def values_of(critic, rows, args):
    """The critic's value before each response token, [B, T]."""
    return critic(rows.ids, rows.states).squeeze(-1)


FORWARD = {"actor": log_probs, "critic": values_of}  # what each trained model is asked for


def collect(step, round, models, train, examiner, reward_of, session, meter):
    """Steps 1 and 2: this rank's reward.Answers, rewards included; None where the run is to end."""
    args, ranks, tokens = session.args, session.ranks, examiner.tokens
    N = args.samples_per_prompt

    # 1. Sample. This rank owns every W-th of the step's prompts.
    mine = rollout.step_prompts(args, len(train), step, round)[ranks.rank :: ranks.world]
    keys = [(i, j) for i in mine for j in range(N)]  # sample j of prompt i
    with models.gathered(models.policy) as lm, session.may_give_up(len(keys)) as progress:
        samples = sampler.sample(
            lm,
            [train.prompts[i] for i in mine],
            sampler.draw_uniforms(args.seed, step, keys, args.max_new_tokens),
            stop=tokens.stop,
            never=tokens.never,
            samples_per_prompt=N,
            temperature=args.temperature,
            batch=session.slots,
            compiled=args.compile,
            progress=progress,
        )
    if session.stops():
        return None
    meter.lap("sample")

    # 2. Score: by --verify to know the truth, by the reward slot to learn from.
    problems, asked = ([part[i] for i, _ in keys] for part in (train.problems, train.prompts))
    texts = tokens.decode(asked, samples.ids)
    with session.rescues():  # a user's function may fail, on one rank
        answers = reward.Answers(
            problems,
            texts,
            scores=examiner.scores(problems, texts),  # [B]
            finished=torch.tensor(samples.finished),
            rows=rollout.collate(asked, samples.ids, tokens.pad, ranks.device, samples.logp),
            seed=args.seed,
            reward_models=models.reward_models,
            microbatch=args.microbatch,
        )
        answers.rewards = reward_of(answers) - args.missing_eos_penalty * ~answers.finished  # [B]
    meter.lap("score")
    return answers


def backward(trained, rows, args, ranks):
    """Gradients of both losses over one minibatch, and this rank's sums for every metric."""
    sums = Counter()
    for mb in fsdp.accumulate(trained, rows.microbatches(args.microbatch)):
        for name, (model, _) in trained.items():  # one model's activations at a time
            output = FORWARD[name](model, mb, args)
            loss, metrics = ppo.losses(name, output, mb, args.clip, args.value_clip)
            (loss * ranks.world).backward()  # FSDP averages over ranks, the loss is a sum
            sums.update(metrics)
    return sums


def main(args, ranks=None):
    lab.resolve(args)  # where an argument says "lab": its path below runs/lab
    if args.export or args.plan:
        return run.answer(args)  # a question about a run, answered without one
    ranks = ranks or fsdp.init_ranks(args.device, args.shard_group_size, args.collective_timeout)
    P, N = args.prompts_per_step, args.samples_per_prompt

    # What is asked for, checked before anything is made or written
    with fsdp.agreed(ranks):
        weigh = filters.load_filter(args.filter, N, known=filters.known_to(args.reward_model))
        reward_of = reward.load_reward(args.reward, args.reward_model, args.reward_clip)
        ranks.say(rollout.check_sizes(args, filters.kept_per_prompt(weigh, N), ranks.world))
    lab.check(args, ranks, reward_of)  # files and folders, where something is to be made
    loading.fetch(args, ("policy", "reward_model"), ranks)
    session = run.Session(args, ranks)  # its folder, checkpoints, logs and end
    lab.make(args, ranks, train_rm.make_for_lab)  # what is named of it and not there yet
    inputs = data.read_inputs(args, ranks.say)
    session.check(inputs, reward_of)  # what can still be told before models are loaded

    # Models, and the state that a checkpoint holds
    models = loading.load_models(args, inputs.tokens, ranks)
    run.prove_models(models, inputs.tokens, args, ranks.device)
    examiner = Examiner(inputs.tokens, args, ranks, slots=session.slots)  # asks, runs tests
    trained = {
        "actor": (models.policy, fsdp.adamw(models.policy, args.actor_lr)),
        "critic": (models.critic, fsdp.adamw(models.critic, args.critic_lr)),
    }
    state = session.load(trained)  # the newest checkpoint's, or that of step 0
    models.normalise(state, examiner, inputs.train, reward_of)
    if args.selfcheck:
        return run.selfcheck(models, trained, examiner, inputs.train, FORWARD, backward)
    session.open(models, examiner, inputs.validation, state)

    for step in range(state.step, args.steps):
        meter, answers = Meter(ranks), None
        for round in range(1 + args.refill):
            # 1. Sample, 2. Score
            more = collect(step, round, models, inputs.train, examiner, reward_of, session, meter)
            if more is None:
                break
            answers = more if answers is None else answers + more

            # 3. FILTER. Rank 0 weighs all rewards [P, N] (with --refill [rounds P, N]).
            rewards, given = answers.gathered(weigh.asks, N, ranks)
            generator = rollout.seeded("filter", args.seed, step)
            weights = session.on_main(weigh, rewards, generator, given)
            if (weights.sum(1) > 0).sum() >= P:
                break
        if more is None:
            break  # told to end, and nothing has changed in this step
        weights[(weights.sum(1) > 0).cumsum(0) > P] = 0  # no more than P prompts teach
        answers.rows.rewards = answers.rewards.to(ranks.device)
        kept = answers.rows.kept(weights, args.minibatch, ranks)  # this rank's survivors

        # How far pi has gone from the reference, on one random sample of each prompt
        watched = answers.rows.one_of_each(rewards, ranks, rollout.seeded("kl", args.seed, step))
        watched.old_logp, _ = watched.evaluate(log_probs, models.policy, args)
        watched.ref_logp, _ = watched.evaluate(log_probs, models.reference, args)
        meter.watched(watched)
        session.check_sampler(watched)  # in the first step
        if len(kept):
            # 4. Log-probs and values, for survivors only: this is where filtering saves time.
            kept.old_logp, kept.entropy = kept.evaluate(log_probs, models.policy, args)
            kept.ref_logp, _ = kept.evaluate(log_probs, models.reference, args)
            kept.old_values = kept.evaluate(values_of, models.critic, args)

            # 5. Advantages
            how = args.gamma, args.lam, fsdp.sum_over_ranks
            kept.adv, kept.returns = ppo.advantages(kept, state.kl_coef, *how)
            how = args.loss_aggregation, len(kept.parts), fsdp.sum_over_ranks
            kept.coefficients = ppo.loss_coefficients(kept.mask, kept.weights, *how)
            meter.kept(kept)

        # 6. Update
        if session.stops():
            break  # the last moment at which nothing has changed
        warm = min(1.0, (step + 1) / (1 + args.warmup * args.steps))
        for epoch in range(args.ppo_epochs):
            for rows in kept.minibatches(rollout.seeded("minibatches", args.seed, step, epoch)):
                meter.losses(backward(trained, rows, args, ranks))
                for name, (model, optimizer) in trained.items():
                    meter.gradient(name, fsdp.step(model, optimizer, warm, args.grad_norm))
        meter.lap("update")

        # Measure, choose, save
        state.step = step + 1
        meter.samples(answers, rewards, weights)
        row = meter.row(state)
        if args.kl_target and meter.updates:
            state.kl_coef = ppo.adapted_kl_coef(state.kl_coef, row["kl_k1"], args.kl_target, P * N)
        if state.step % args.eval_every == 0 or state.step == args.steps:
            row["validation"] = session.look(models, examiner, inputs.validation, state)
        meter.lap("validation")
        session.save(trained, state)
        meter.lap("save")
        session.log(row | meter.laps, answers, weights[ranks.rank :: ranks.world].flatten())

    if not session.close(trained, state):  # all is saved; True where it was told to end
        examiner.compare(models, session.folder, inputs.test, state)
        session.leave(state)


if __name__ == "__main__":
    run.launch(main, Args)
