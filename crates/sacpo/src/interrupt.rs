//! Ctrl-C: the first asks the work to stop at the next good moment, the second ends the process at once.

use std::sync::atomic::{AtomicBool, Ordering};

use engine::{Error, Result};

use crate::ui;

static REQUESTED: AtomicBool = AtomicBool::new(false);

/// Listens for Ctrl-C and termination signals.
///
/// # Errors
/// If the system refuses a handler.
pub(crate) fn listen() -> Result<()> {
    ctrlc::set_handler(|| {
        if REQUESTED.swap(true, Ordering::SeqCst) {
            ui::say("\nStopped at once. What was saved before is complete.");
            std::process::exit(130);
        }
        ui::say("\nStopping after the work at hand; press Ctrl-C again to stop at once.");
    })
    .map_err(|error| Error::Failed(format!("Could not listen for Ctrl-C: {error}.")))
}

/// Whether Ctrl-C was pressed.
pub(crate) fn requested() -> bool {
    REQUESTED.load(Ordering::SeqCst)
}

/// An error when Ctrl-C was pressed, for loops whose work is not resumed in the middle.
pub(crate) fn check() -> Result<()> {
    if requested() {
        return Err(Error::Interrupted(
            "Stopped, as you asked. Run the same command again to go on; what is saved is not computed again.".into(),
        ));
    }
    Ok(())
}
