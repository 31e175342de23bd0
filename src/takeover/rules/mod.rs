//! Tests of the rules in `protocol.md` that the state machines of both sides keep.

mod giver;
mod taker;

use std::time::Duration;

use super::protocol::FromTaker;

const SECOND: Duration = Duration::from_secs(1);
const HELLO: FromTaker = FromTaker::Hello { lowest: 1, highest: 1 };
