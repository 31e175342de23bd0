//! The rules of `protocol.md` that are kept by the values of both sides.

mod giver;
mod taker;

use std::time::Duration;

use super::protocol::FromTaker;

const SECOND: Duration = Duration::from_secs(1);
const HELLO: FromTaker = FromTaker::Hello { lowest: 1, highest: 1 };
