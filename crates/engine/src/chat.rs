//! Conversations, as chat templates take them.

use serde::{Deserialize, Serialize};

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant` or another role that the template knows.
    pub role: String,
    /// What is said.
    pub content: String,
}
