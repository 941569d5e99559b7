//! Schedules of a pause that tests choose. Empty outside this crate's tests.

#[cfg(test)]
mod chosen;

#[cfg(not(test))]
mod none {
    /// Kicks follow each other at once, and saves wait for all vCPUs.
    #[derive(Debug, Default)]
    pub(crate) struct Schedule {}

    impl Schedule {
        pub(crate) fn before_kick(&self) {}

        pub(crate) fn saves_early(&self) -> bool {
            false
        }
    }
}

#[cfg(test)]
pub(crate) use chosen::Schedule;
#[cfg(not(test))]
pub(crate) use none::Schedule;
