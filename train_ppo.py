"""PF-PPO: Policy Filtration for PPO (arXiv 2409.06957), on one page.

    torchrun train_ppo.py --filter best_random                       # the lab, from nothing
    torchrun --nproc_per_node 8 train_ppo.py --policy DIR --reward_model DIR --prompts FILE

Each step:
    1. sample      N responses to each of P prompts from the policy pi
    2. score       by the reward model (and by tests where there are some, only to watch)
    3. FILTER      rewards [P, N] -> weights [P, N]: what is kept is a sample of mu
    4. evaluate    log-probs of policy and reference, values of the critic: survivors only
    5. advantages  -beta (log pi - log ref) per token, + reward at the last one; GAE; whitening
    6. update      clipped PPO losses of actor and critic

Without step 3 this is PPO. Not covered: asynchronous sampling, several turns, adapters.
"""

import contextlib
import math
import sys
from collections import Counter, deque
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import train_rm
from pfppo import (
    batch,
    checkpoint,
    data,
    examine,
    export,
    filters,
    fsdp,
    lab,
    loading,
    memory,
    metrics,
    peers,
    ppo,
    rundir,
    selfcheck,
)
from pfppo.config import Count, Natural, NonNegative, Positive, Seed, Share, launch, require
from pfppo.inputs import read_inputs
from pfppo.model import read_causal_lm
from pfppo.reward import BY_MODEL, Answers, load_reward, model_rewards, raw_spread, try_reward
from pfppo.sampler import draw_uniforms, sample
from pfppo.sandbox import Sandbox
from pfppo.stopping import Stop

import torch


@dataclass
class Args:
    policy: str = "lab"  # SFT policy to start from: a folder, or "lab" (made on first use)
    reward_model: str = "lab"  # reward model and start of the critic: a folder, "lab", or "" (none)
    prompts: str = "lab"  # JSONL with prompt (and entry_point, test to know scores), or "lab"
    validation: str = "auto"  # problems that choose the policy; auto: the lab's with its prompts
    test: str = "auto"  # problems of the final table; auto: the lab's with its prompts
    filter: str = "best_random"  # name in FILTERS, module:function or file.py:function
    reward: str = "model"  # in REWARDS, module:function or file.py:function
    steps: Count = 30  # PPO steps
    prompts_per_step: Count = 48  # P
    samples_per_prompt: Count = 5  # N
    minibatch: Count = 48  # kept rows per optimizer step, over all ranks
    microbatch: Count = 48  # rows per forward and rank; memory only, changes no number
    ppo_epochs: Count = 1  # times that each kept row is used
    max_new_tokens: Count = 64  # longest response
    max_prompt_tokens: Count = 1024  # longest prompt; a longer one is an error
    temperature: Positive = 1.0  # of sampling, and of all log-probs
    sampling_batch: Count = 256  # rows that decode together; memory only, changes no number
    prompt_style: Literal["plain", "chat", "deepseek"] = "plain"  # as code, or as a dialogue
    kl_coef: NonNegative = 0.2  # beta; the paper: 0.01 at 6.7B
    kl_target: NonNegative = 0.0  # nats per response that beta is adapted to; 0: beta is fixed
    reward_clip: Positive = 10.0  # limit of the normalised reward
    missing_eos_penalty: NonNegative = 0.0  # taken off the reward of a truncated response
    gamma: Share = 1.0  # discount
    lam: Share = 0.95  # lambda of GAE
    clip: Positive = 0.2  # of the ratio
    value_clip: Positive = 0.2  # of the change of a value
    loss_aggregation: Literal["sequence_mean", "token_mean"] = "sequence_mean"  # what counts alike
    actor_lr: Positive = 2e-4  # AdamW (.9, .95); the paper: 5e-7 at 6.7B
    critic_lr: Positive = 5e-4  # AdamW (.9, .95); the paper: 9e-6 at 6.7B
    grad_norm: Positive = 1.0  # global norm that gradients are clipped to
    warmup: Share = 0.03  # share of the steps in which learning rates rise
    seed: Seed = 1  # order of prompts, samples, filter
    run_dir: str = ""  # metrics, samples, checkpoints, policies; empty: runs/FILTER, -2, ...
    resume: bool = False  # go on from the last complete checkpoint in --run_dir, if there is one
    save_every: Count = 10  # steps between checkpoints
    keep: Count = 2  # checkpoints that stay
    grace_seconds: Positive = 25.0  # SIGTERM to SIGKILL: a run saves and exits 0 in between
    export: str = ""  # write --run_dir's newest checkpoint (or step_N) here for transformers; stop
    eval_every: Count = 5  # steps between looks at validation
    timeout: Positive = 3.0  # CPU seconds that one sample's tests may take
    workers: Count = 2  # sandbox processes per rank
    require_isolation: bool = False  # refuse a sandbox without namespaces and seccomp
    param_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on GPU
    gradient_checkpointing: bool = False  # blocks run again in backward; memory only
    plan: bool = False  # print the memory that a run would need, and stop: no ranks, no weights
    device_memory: NonNegative = 0.0  # GB per device that a run must fit into; 0: what it has
    world_size: Natural = 0  # ranks of --plan; 0: those there are
    selfcheck: bool = False  # check invariants on these models with a tiny batch, and stop
    offload_ref: bool = False  # the reference waits in host memory; memory only
    offload_reward: bool = False  # so does the reward model
    offload_optimizer: bool = False  # so do weights, gradients, Adam states of actor and critic
    shard_group_size: Natural = 0  # shard over so many ranks, a node's, and replicate; 0: over all
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one


def adamw(model, lr):
    return torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )


def log_probs(model, rows, args):
    """Log-probs of the responses and entropy, [B, T]: old, new and reference ones."""
    return model(rows.ids, rows.states, rows.responses, rows.mask, args.temperature)


def values_of(critic, rows):
    """The critic's value before each response token, as a list of one [B, T]."""
    return [critic(rows.ids, rows.states).squeeze(-1)]


def backward(args, policy, critic, rows, ranks):
    """Gradients of both losses over one minibatch; rows of all ranks share one denominator.

    Returns this rank's part of every loss metric.
    """
    sums = Counter()
    coefficients = ppo.loss_coefficients(rows.mask, rows.weights, args.loss_aggregation)
    total = fsdp.sum_over_ranks(coefficients.sum())
    for mb in rows.microbatches(args.microbatch):
        coefficients = ppo.loss_coefficients(mb.mask, mb.weights, args.loss_aggregation) / total
        logp, _ = log_probs(policy, mb, args)
        loss, actor_metrics = ppo.policy_loss(logp, mb.old_logp, mb.adv, coefficients, args.clip)
        (loss * ranks.world).backward()  # FSDP averages over ranks, the loss is a sum
        (values,) = values_of(critic, mb)  # only now: one model's activations at a time
        loss, critic_metrics = ppo.value_loss(
            values, mb.old_values, mb.returns, coefficients, args.value_clip
        )
        (loss * ranks.world).backward()
        sums.update(actor_metrics | critic_metrics)
    return sums


def step_optimizer(model, optimizer, args):
    """Clip, step, clear. A gradient that is not finite skips the step. Returns its norm."""
    norm = fsdp.clip_gradients(model, args.grad_norm)
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm


def main(args, ranks=None):
    if args.export:
        return export.from_run(args.run_dir, args.export)
    if args.plan:
        return memory.show(args)
    args.resume |= rundir.restarted()
    ranks = ranks or fsdp.init_ranks(args.device, args.shard_group_size)
    stopping = Stop(ranks, args.grace_seconds)
    P, N = args.prompts_per_step, args.samples_per_prompt
    with fsdp.agreed(ranks):
        chosen = filters.load_filter(args.filter, N)
        kept_per_prompt = filters.kept_per_prompt(chosen, N)
    ranks.say(batch.check_sizes(args, fsdp.from_main(kept_per_prompt, ranks), ranks.world))
    reward = load_reward(args.reward, args.seed)
    require(
        args.reward not in BY_MODEL or args.reward_model,
        f"--reward {args.reward}: needs a --reward_model, found none",
    )
    label = args.filter if args.filter.isidentifier() else "own_filter"
    name = (rundir.latest if args.resume else rundir.unused)(f"runs/{label}")
    args.run_dir = args.run_dir or fsdp.from_main(str(name), ranks)
    used = lab.resolve(args)
    loading.fetch(args, ("policy", "reward_model"), ranks)
    run = rundir.check_run(args, ranks)
    lab.make(ranks, args, used)
    if "reward_model" in used and not Path(args.reward_model).exists():
        train_rm.make_for_lab(args.reward_model, ranks)

    # Data
    given = read_inputs(args)
    problems, prompts = given.problems, given.prompts
    tokenizer, pad_id = given.tokenizer, given.pad_id
    with fsdp.agreed(ranks):
        try_reward(args.reward, reward, problems[:2])
    longest = max(map(len, prompts + given.validation[1] + given.test[1]))
    memory.require_fits(args, ranks, longest)

    # Models, optimizers, state
    policy, reference, twin = loading.load_policies(
        args.policy, ranks, args.param_dtype, args.offload_ref, args.offload_optimizer
    )
    reward_model, critic, normalised = loading.load_scalars(args, tokenizer, ranks)
    for model in (policy, critic) if args.gradient_checkpointing else ():
        fsdp.recompute_blocks(model)
    actor_optimizer, critic_optimizer = adamw(policy, args.actor_lr), adamw(critic, args.critic_lr)
    trained = {"actor": (policy, actor_optimizer), "critic": (critic, critic_optimizer)}
    sandbox = Sandbox(args.workers, args.timeout, require_isolation=args.require_isolation)
    ranks.say(f"sandbox: {sandbox.mode}")
    examiner = examine.Examiner(
        tokenizer, given.stop, sandbox, ranks, args.seed, args.max_new_tokens, args.sampling_batch
    )

    def select(step):
        """Look at validation, and export the policy if it is the best so far (or none is known)."""
        value = None
        if given.validation[0]:
            with fsdp.gathered(policy.lm, twin) as model:
                value = metrics.mean(examiner.passed(model, given.validation, 0.0))
        if value is None or state["best"] is None or value > state["best"]:
            state.update(best=value, best_step=step)
            export.write_best(policy.lm, run, twin, tokenizer, ranks, state)
        return value

    state = None if args.selfcheck else checkpoint.load(run, trained, ranks)
    if not normalised:  # an RM from elsewhere: rewards get mean 0 and standard deviation 1 here
        found = state["normaliser"] if state else None
        if not found:
            with fsdp.gathered(reference.lm, twin) as model:
                rows = examiner.rows(model, problems[:256], prompts[:256], args.temperature, pad_id)
            found = raw_spread(reward_model, rows, args.microbatch, args.reward_model)
        for scalar in (reward_model, critic):
            scalar.mean, scalar.std = found
    if args.selfcheck:
        sandbox.close()
        subject = examiner, problems, prompts, pad_id, policy, reference, twin, reward_model, critic
        sys.exit(selfcheck.run(selfcheck.Subject(args, *subject, log_probs, values_of, backward)))
    rundir.open_run(args, ranks)  # nothing was written before everything had been checked
    if state is None:
        if args.resume:
            ranks.say(f"{run}: no checkpoint to go on from, starting at step 1")
        state = {"step": 0, "kl_coef": args.kl_coef, "best": None, "best_step": 0}
        state |= {"empty_steps": 0, "skipped_updates": 0, "normaliser": [critic.mean, critic.std]}
        value = select(0)
        ranks.say(f"validation before training: {'-' if value is None else f'{value:.3f}'}")
    saver = checkpoint.Saver(run, ranks, args.keep, state["step"])
    recent = deque(rundir.last_steps(run / "samples.jsonl", metrics.R2_STEPS), metrics.R2_STEPS)
    stopping.holding = True

    for step in range(state["step"], args.steps):
        clock, meter = metrics.Clock(), metrics.Meter()

        # 1. Sample. This rank owns every W-th of the step's prompts.
        indices = data.step_prompts(len(problems), P, step, args.seed)
        mine = [indices[place] for place in batch.owned(P, ranks.rank, ranks.world)]
        keys = [(index, j) for index in mine for j in range(N)]  # which sample of which prompt
        with fsdp.gathered(policy.lm, twin) as model, stopping.giving_up():
            samples = sample(
                model,
                [prompts[index] for index in mine],
                draw_uniforms(args.seed, step, keys, args.max_new_tokens),
                stop=given.stop,
                samples_per_prompt=N,
                temperature=args.temperature,
                batch=args.sampling_batch,
                progress=stopping.check,
            )
        if stopping.agreed():
            break  # nothing has changed in this step
        clock.lap("sample")

        # 2. Score: by the tests to know the truth, by the reward slot to learn from.
        rollout = batch.collate([prompts[i] for i, _ in keys], samples.ids, pad_id, ranks.device)
        asked = [problems[i] for i, _ in keys]
        texts = [data.decode(ids, tokenizer) for ids in samples.ids]
        scores = examine.scores_of(examine.execute(asked, texts, sandbox))
        judge = partial(model_rewards, reward_model, rollout, args.microbatch, args.reward_clip)
        with fsdp.agreed(ranks):
            rewards = reward(Answers([p.question for p in asked], texts, asked, scores, judge))
            require(rewards.isfinite().all(), f"--reward {args.reward}: a reward is not finite")
        finished = torch.tensor(samples.finished)
        rewards = rewards - args.missing_eos_penalty * ~finished
        clock.lap("score")

        # 3. FILTER. Every rank sees all rewards [P, N] and has the same weights [P, N].
        all_rewards = fsdp.gather_rows(rewards.view(P // ranks.world, N), ranks)
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        with fsdp.agreed(ranks):
            weights = chosen(all_rewards, generator)
        weights = fsdp.from_main(weights, ranks)  # a filter of one's own may draw from elsewhere
        rollout.rewards = rewards.to(ranks.device)
        rollout.weights = weights[ranks.rank :: ranks.world].flatten().to(ranks.device)
        survivors = [
            rollout.padded_select(*batch.rows_of(*part, N, ranks.rank, ranks.world))
            for part in batch.minibatch_plan(weights, args.minibatch)
        ]  # one Rollout per optimizer step

        # 4. Log-probs and values, for survivors only: this is where filtering saves time.
        for rows in survivors:
            size = args.microbatch
            rows.old_logp, entropy = batch.over_microbatches(log_probs, policy, rows, size, args)
            rows.ref_logp, _ = batch.over_microbatches(log_probs, reference, rows, size, args)
            (rows.old_values,) = batch.over_microbatches(values_of, critic, rows, size)

            # 5. Advantages
            kl = ppo.kl_k1(rows.old_logp, rows.ref_logp)
            token_rewards = ppo.token_rewards(rows.rewards, kl, rows.mask, state["kl_coef"])
            rows.adv, rows.returns = ppo.gae(
                token_rewards, rows.old_values, rows.mask, args.gamma, args.lam
            )
            kept = (rows.weights > 0).float()
            meter.mean("kl_k1", (kl * rows.mask).sum(1), kept)
            meter.mean("kl_k3", (ppo.kl_k3(rows.old_logp, rows.ref_logp) * rows.mask).sum(1), kept)
            meter.mean("entropy", entropy, rows.mask * kept[:, None])
        explained = None
        if survivors:  # whitened over the global batch, so only when all minibatches are there
            adv, old_values, returns, token_weights = (
                batch.flat(survivors, name)
                for name in ("adv", "old_values", "returns", "token_weights")
            )
            batch.unflat(survivors, "adv", ppo.whiten(adv, token_weights, fsdp.sum_over_ranks))
            explained = ppo.explained_variance(
                old_values, returns, token_weights, fsdp.sum_over_ranks
            ).item()

        # 6. Update
        if stopping.agreed():
            break  # nothing has changed yet
        warm = min(1.0, (step + 1) / max(1, math.ceil(args.warmup * args.steps)))
        actor_optimizer.param_groups[0]["lr"] = args.actor_lr * warm
        critic_optimizer.param_groups[0]["lr"] = args.critic_lr * warm
        updates = 0
        for epoch in range(args.ppo_epochs):
            order = torch.randperm(len(survivors), generator=generator).tolist()
            for rows in [survivors[i] for i in order] if epoch else survivors:
                sums = backward(args, policy, critic, rows, ranks)
                ratios = sums.pop("ratio_sum"), sums.pop("tokens")
                if updates == 0:
                    meter.add("ratio_first_minibatch", *ratios)
                for name, value in sums.items():
                    meter.share(name, value)
                for name, (model, optimizer) in trained.items():
                    norm = step_optimizer(model, optimizer, args)
                    meter.share(f"grad_norm_{name}", torch.tensor(norm / ranks.world))
                    state["skipped_updates"] += not math.isfinite(norm)
                updates += 1
        state["empty_steps"] += not updates
        clock.lap("update")

        # Measure, choose, save
        step += 1
        lengths = torch.tensor([len(ids) for ids in samples.ids])
        watched = (
            fsdp.gather_rows(x.float().view(-1, N), ranks) for x in (scores, lengths, finished)
        )
        row = {"step": step, **metrics.of_samples(all_rewards, weights, *watched)}
        row |= meter.result(updates) | {"explained_variance": explained}
        row |= {name: state[name] for name in ("kl_coef", "empty_steps", "skipped_updates")}
        if args.kl_target and updates:
            now = row["kl_coef"], row["kl_k1"]
            state["kl_coef"] = ppo.adapted_kl_coef(*now, args.kl_target, P * N)
        looking = step % args.eval_every == 0 or step == args.steps
        row["validation"] = select(step) if looking else None
        clock.lap("validation")
        state["step"] = step
        saver.poll()  # what was begun some steps ago may be complete now
        if step % args.save_every == 0 or step == args.steps:
            saver.start(step, trained, state)
        clock.lap("save")
        speed = row["response_length"] * P * N / clock.laps["seconds_sample"]
        row |= {"tokens_per_second": speed, **clock.laps}
        records = metrics.sample_records(step, N, asked, texts, rewards, scores, rollout.weights)
        recent.append(sum(fsdp.gather_lists(records, ranks), []))
        row |= metrics.rolling_r2(recent)
        rundir.append_step(run, metrics.complete(row), recent[-1], ranks)
        ranks.say(metrics.line(row, args.steps))
    if stopping.agreed() and saver.newest != state["step"]:
        saver.start(state["step"], trained, state)
    saver.finish()
    if stopping.agreed():
        sandbox.close()
        stopping.close()
        return ranks.say(f"{run}: SIGTERM, saved after step {state['step']}; go on with --resume")
    stopping.release()

    # How it went, on problems that nothing was chosen by
    exported = "best on validation" if given.validation[0] else "exported"
    if given.test[0]:
        best = read_causal_lm(run / "policy", dtype=twin.dtype).to(ranks.device)
        policies = {
            "before": fsdp.gathered(reference.lm, twin),
            f"{exported}, step {state['best_step']}": contextlib.nullcontext(best),
            f"last, step {state['step']}": fsdp.gathered(policy.lm, twin),
        }
        examiner.compare(policies, given.test, args.temperature, run / "result.json")
    sandbox.close()
    stopping.close()
    ranks.say(f"{run}: policy/ ({exported}), metrics.jsonl, samples.jsonl, checkpoints/")
    ranks.say(f"peak memory of rank 0: {metrics.peak_gib():.1f} GiB")


if __name__ == "__main__":
    launch(peers.together(main), Args)
