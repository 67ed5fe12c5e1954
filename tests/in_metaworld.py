"""PUSHT's net and sampler on a robot arm: pip install metaworld first.
It is to grasp a puck and to carry it to a goal in the air, each time at other places."""
import copy
import math
import sys
import warnings

import torch
from loading import load

try:
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE as TASKS
    from metaworld.policies import SawyerPickPlaceV3Policy as Expert
except ImportError:
    sys.exit("skipped: needs pip install metaworld")
main = load("PUSHT")
warnings.simplefilter("ignore")     # the expert asks for more than 1
EPISODES = 300      # demonstrations
LENGTH = 200        # control steps; the expert needs 55
NOISE = 0.25        # the disturbance's standard deviation, at most
STEPS = 2000        # of training
LR = 1e-3
alpha_bar = main.noise_schedule(main.SCHEDULE, main.T).float()


def begin(arm, seed):
    """What is seen (39,) of the seed's places."""
    arm.seed(seed)
    return torch.from_numpy(arm.reset()[0]).float()


def act(arm, action):
    """What is seen next, and whether the puck is at the goal."""
    seen, _, _, _, info = arm.step(action.numpy())
    return torch.from_numpy(seen).float(), info["success"] > 0


def demonstrate(arm, seen):
    """Plans (N, 4, 1, 16), observations (N, 39), disturbed as in PUSHT/world.py."""
    sigma = NOISE * torch.rand(1)
    noise = torch.zeros(4)
    rows = []
    end = LENGTH
    while len(rows) < end:
        command = torch.from_numpy(Expert().get_action(seen.numpy())).clamp(-1, 1)
        rows.append((command, seen))
        noise = 0.7 * noise + (1 - 0.7 ** 2) ** 0.5 * sigma * torch.randn(4)
        seen, success = act(arm, (command + noise).clamp(-1, 1))
        if success:
            end = min(end, len(rows) + main.HORIZON)
    commands, y = map(torch.stack, zip(*rows))
    plans = commands.unfold(0, main.HORIZON, 1)  # (N, 4, 16)
    return plans[:, :, None], y[:len(plans)]


def train(plans, y, first):
    """As in PUSHT/main.py, at noise levels from first to T."""
    net = main.UNet(main.CHANNELS, coordinates=4, observations=y.shape[1])
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), LR, betas=(0.9, 0.99))
    for step in range(STEPS):
        i = torch.randint(len(plans), (256,))
        t = torch.randint(first, main.T + 1, (256,))
        eps = torch.randn(plans[i].shape)
        x_t = main.q_sample(plans[i], t, eps, alpha_bar)
        goal = main.to_target(plans[i], t, eps, alpha_bar, main.TARGET)

        optimizer.zero_grad()
        with main.autocast(eps.device):
            output = net(x_t, t, y[i])
        main.F.mse_loss(output.float(), goal).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        lr = LR * min(step / main.WARMUP, 1) * (1 + math.cos(math.pi * step / STEPS)) / 2
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()

        decay = (1 + step) / (30 + step)
        for p_ema, p in zip(ema.parameters(), net.parameters()):
            p_ema.lerp_(p.detach(), 1 - decay)
    return ema


def drive(arm, seen, net, scale, steps):
    """Whether an episode succeeds."""
    for k in range(LENGTH):
        if k % main.DRIVEN == 0:
            x_T = torch.randn(1, 4, 1, main.HORIZON)
            *_, (_, x_0, _) = main.sample(net, x_T, scale(seen[None]), alpha_bar, steps=steps)
        seen, success = act(arm, x_0[0, :, 0, k % main.DRIVEN])
        if success:
            return True
    return False


if __name__ == "__main__":
    seed = int(sys.argv[1]) if sys.argv[1:] else 0
    torch.manual_seed(seed)
    arm = TASKS["pick-place-v3-goal-observable"]()
    arm._freeze_rand_vec = False    # other places at each reset,
    arm.seeded_rand_vec = True      # by its own seed

    # what varies is scaled to [-1, 1]
    rows = [demonstrate(arm, begin(arm, 1000 * seed + i)) for i in range(EPISODES)]
    plans, y = map(torch.cat, zip(*rows))
    low = y.amin(dim=0)
    high = y.amax(dim=0)

    def scale(y):
        return (2 * (y - low) / (high - low) - 1)[:, high > low]

    print(f"{EPISODES} demonstrations, {len(plans):,} plans, {scale(y).shape[1]} numbers seen")
    unseen = range(10 ** 6, 10 ** 6 + 50)
    for name, first, steps in (("diffusion", 1, main.SAMPLE_STEPS), ("regression", main.T, 1)):
        net = train(plans, scale(y), first)
        won = sum(drive(arm, begin(arm, i), net, scale, steps) for i in unseen)
        print(f"{name}: {won} of {len(unseen)} unseen episodes succeed")
