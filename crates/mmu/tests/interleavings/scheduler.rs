//! Every schedule with few preemptions.
//!
//! Nearly every error of a concurrent protocol shows itself in a schedule in which threads are
//! interrupted only once or twice, if in the right places. So all of those are tried: a thread runs
//! until it waits, yields or ends, except at up to `bound` points, and these are every choice of
//! points and of threads to go on with, in turn.

use shuttle::scheduler::{Schedule, Scheduler, Task, TaskId};

/// One decision: the threads to try, and which of them is being tried.
#[derive(Debug)]
struct Decision {
    choices: Vec<TaskId>,
    chosen: usize,
    /// Whether all choices but the first interrupt a thread that could have gone on.
    preempts: bool,
}

/// A depth-first search through all schedules with at most `bound` preemptions.
#[derive(Debug)]
pub(crate) struct FewPreemptions {
    bound: usize,
    most: usize,
    decisions: Vec<Decision>,
    /// The next decision of this execution.
    step: usize,
    preemptions: usize,
    executions: usize,
    /// When each thread ran last, by step.
    last_run: Vec<usize>,
    steps: usize,
    /// Set once everything has been tried.
    pub(crate) exhausted: std::sync::Arc<std::sync::atomic::AtomicBool>,
}

impl FewPreemptions {
    /// At most `most` schedules are tried.
    pub(crate) fn new(bound: usize, most: usize) -> Self {
        Self {
            bound,
            most,
            decisions: Vec::new(),
            step: 0,
            preemptions: 0,
            executions: 0,
            last_run: Vec::new(),
            steps: 0,
            exhausted: std::sync::Arc::default(),
        }
    }

    fn ran(&mut self, task: TaskId) -> TaskId {
        let number = usize::from(task);
        if self.last_run.len() <= number {
            self.last_run.resize(number + 1, 0);
        }
        self.steps += 1;
        self.last_run[number] = self.steps;
        task
    }

    fn decide(&mut self, choices: Vec<TaskId>, preempts: bool) -> TaskId {
        if choices.len() == 1 {
            return choices[0];
        }
        if self.step == self.decisions.len() {
            self.decisions.push(Decision {
                choices,
                chosen: 0,
                preempts,
            });
        }
        let decision = &self.decisions[self.step];
        self.step += 1;
        self.preemptions += usize::from(decision.preempts && decision.chosen > 0);
        decision.choices[decision.chosen]
    }
}

impl Scheduler for FewPreemptions {
    fn new_execution(&mut self) -> Option<Schedule> {
        if self.executions > 0 {
            // On to the next choice at the last decision that has one.
            while let Some(last) = self.decisions.last_mut() {
                last.chosen += 1;
                if last.chosen < last.choices.len() {
                    break;
                }
                self.decisions.pop();
            }
            if self.decisions.is_empty() {
                self.exhausted
                    .store(true, std::sync::atomic::Ordering::SeqCst);
                return None;
            }
        }
        if self.executions == self.most {
            return None;
        }
        self.executions += 1;
        self.step = 0;
        self.steps = 0;
        self.preemptions = 0;
        self.last_run.clear();
        Some(Schedule::new(0))
    }

    fn next_task(
        &mut self,
        runnable: &[&Task],
        current: Option<TaskId>,
        is_yielding: bool,
    ) -> Option<TaskId> {
        let all: Vec<_> = runnable.iter().map(|task| task.id()).collect();
        let going_on = current.filter(|current| all.contains(current));
        let next = match going_on {
            Some(current) if !is_yielding => {
                let mut choices = vec![current];
                if self.preemptions < self.bound {
                    choices.extend(all.iter().filter(|&&task| task != current));
                }
                self.decide(choices, true)
            }
            // A thread that waits for another gives way to the one that has waited longest, so
            // that all go on.
            Some(current) => {
                let ran = |task: &&TaskId| self.last_run.get(usize::from(**task)).copied();
                let others = all.iter().filter(|&&task| task != current);
                others.min_by_key(ran).copied().unwrap_or(current)
            }
            None => self.decide(all, false),
        };
        Some(self.ran(next))
    }

    fn next_u64(&mut self) -> u64 {
        // The tests ask for no random numbers.
        0
    }
}
