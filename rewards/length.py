"""Length: what a long answer loses of its reward, and what a long trajectory costs."""

FULL_TOKENS = 256  # up to here an answer keeps its whole reward
HALF_TOKENS = 1024  # from here on it has half
MAX_COST = 0.5


def length_reward(tokens: int) -> float:
    """r_len of a right answer: 1 up to 256 tokens, falling linearly to 0.5 at 1024, then 0.5.

    Source: DataMind, arXiv 2509.25084, the reward of the final answer.

    Args:
        tokens: length of the answer.
    """
    done = (tokens - FULL_TOKENS) / (HALF_TOKENS - FULL_TOKENS)
    return 1.0 - 0.5 * min(max(done, 0.0), 1.0)


def overlong_cost(tokens: int, limit: int, buffer: int) -> float:
    """What a trajectory loses near its limit: nothing up to ``limit - buffer`` tokens, then linearly up to 1.

    Source: DAPO, arXiv 2503.14476, eq. 13, with its sign turned.

    Args:
        tokens: of the trajectory.
        limit: tokens at which it is cut.
        buffer: at least 1.
    """
    return min(max((tokens - (limit - buffer)) / buffer, 0.0), 1.0)


def length_cost(tokens: int, coef: float, target: int) -> float:
    """c_len of a trajectory: ``coef * max(0, tokens / target - 1)``, at most 0.5.

    Args:
        tokens: completion tokens of the trajectory.
        coef: cost of each further ``target`` tokens.
        target: completion tokens that cost nothing, at least 1.
    """
    return min(coef * max(0.0, tokens / target - 1.0), MAX_COST)
