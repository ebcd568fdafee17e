"""Whether machines are fit for a job: facts found on each of them, and a judgement of the facts."""
