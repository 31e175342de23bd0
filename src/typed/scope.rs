//! The descriptors of the message that this thread is encoding or decoding.
//!
//! serde has no place for them in `Serialize` and `Deserialize`, so they are in a thread-local. A
//! codec sets it for the time of one call and a guard takes it out again, also in a panic. A codec
//! that is used inside another one's call has a scope of its own meanwhile.
//!
//! **No descriptor moves before the call has succeeded.** A scope only has further references to
//! them. So a message that can't be encoded still has its own, and one that can't be decoded
//! leaves them all in their slots.

use std::{
    any::Any,
    cell::RefCell,
    collections::{HashMap, hash_map::Entry},
    marker::PhantomData,
    sync::Arc,
    thread::LocalKey,
};

use super::{FdError, TypedError};
use crate::{codec::FdQueue, frame::Fds};

type State = RefCell<Option<Running>>;

/// A message that is being encoded or decoded.
struct Running {
    /// [`Sending`] or [`Slots`], of the connection's type of descriptor.
    fds: Box<dyn Any>,
    /// The last fault of a descriptor, because only a text fits in the error of a format, and
    /// `postcard` drops that.
    fault: Option<FdError>,
}

thread_local! {
    static SENDING: State = const { RefCell::new(None) };
    static RECEIVING: State = const { RefCell::new(None) };
}

/// A descriptor of a message that is encoded.
#[derive(Debug)]
pub(super) enum Outgoing<F> {
    /// The message gives it away.
    Given(Arc<Fds<F>>),
    /// The sender keeps it.
    Lent(Arc<F>),
}

/// The descriptors of a message that is decoded. Whoever holds the second reference to a slot's
/// descriptor has claimed it. When it drops that, as serde does when it tries the variants of an
/// enum one after the other, the descriptor can be claimed again.
pub(super) struct Slots<F> {
    claimable: Vec<Arc<Fds<F>>>,
    /// The descriptors that may belong to the message, in a protocol that does not count them.
    more: Option<FdQueue<F>>,
}

impl<F> Slots<F> {
    /// The descriptors that a message came with.
    pub(super) fn counted(fds: Fds<F>) -> Self {
        Self { claimable: fds.split().map(Arc::new).collect(), more: None }
    }

    /// The descriptors that wait. The message has as many of them as it names.
    #[cfg(feature = "json")]
    pub(super) fn waiting(fds: &mut FdQueue<F>) -> Self {
        Self { claimable: Vec::new(), more: Some(std::mem::take(fds)) }
    }

    /// Gives back what is not the message's. The queue closes it away from the runtime if the
    /// connection ends.
    pub(super) fn give_back(self, fds: &mut FdQueue<F>) {
        if let Some(waiting) = self.more {
            *fds = waiting;
        }
        fds.extend(self.claimable.into_iter().filter_map(Arc::into_inner).flatten());
    }

    fn claim(&mut self, index: u32) -> Result<Arc<Fds<F>>, FdError> {
        while self.claimable.len() <= index as usize {
            let next = self.more.as_mut().and_then(|fds| fds.claim(1).ok());
            let count = self.claimable.len();
            self.claimable.push(Arc::new(next.ok_or(FdError::Missing { index, count })?));
        }
        let slot = &self.claimable[index as usize];
        if Arc::strong_count(slot) > 1 {
            Err(FdError::Doubled { index })
        } else {
            Ok(Arc::clone(slot))
        }
    }

    /// # Errors
    /// [`FdError::Unclaimed`] if the message has not named all of its descriptors.
    fn check_all_claimed(&self) -> Result<(), FdError> {
        let count = self.claimable.iter().filter(|slot| Arc::strong_count(slot) == 1).count();
        if count == 0 { Ok(()) } else { Err(FdError::Unclaimed { count }) }
    }
}

/// Encodes a message by `to_bytes`. Returns what that returns, and the descriptors of the message.
///
/// # Errors
/// If a field can't be encoded, or the error of `to_bytes`. The message has its descriptors as
/// before.
pub(super) fn encode<F: 'static, B>(
    to_bytes: impl FnOnce() -> Result<B, TypedError>,
) -> Result<(B, Vec<Outgoing<F>>), TypedError> {
    let scope = Scope::enter(&SENDING, Sending::<F> { fds: Vec::new(), numbers: HashMap::new() });
    let outcome = to_bytes();
    let (sending, fault) = scope.leave();
    Ok((or_fault(outcome, fault)?, sending.fds))
}

/// Decodes a message by `parse`. Returns it, and the slots of its descriptors in any case.
///
/// # Errors
/// If a descriptor is not as the message says, or the error of `parse`. The slots have all
/// descriptors then.
pub(super) fn decode<F: 'static, M>(
    slots: Slots<F>,
    parse: impl FnOnce() -> Result<M, TypedError>,
) -> (Result<M, TypedError>, Slots<F>) {
    let scope = Scope::enter(&RECEIVING, slots);
    let outcome = parse();
    let (slots, fault) = scope.leave();
    let message = or_fault(outcome, fault).and_then(|message| {
        slots.check_all_claimed()?;
        Ok(message)
    });
    (message, slots)
}

/// A fault without an error is one that the message has got over, such as in a variant of an enum
/// that it turned out not to be.
fn or_fault<T>(outcome: Result<T, TypedError>, fault: Option<FdError>) -> Result<T, TypedError> {
    outcome.map_err(|error| fault.map_or(error, TypedError::Fd))
}

/// Attaches a descriptor to the message that is being encoded. Returns its number there. A field
/// that is serialized twice, as some serializers do to learn the length first, has one number.
///
/// # Errors
/// If this thread is not encoding a message with descriptors of this type.
pub(super) fn attach<F: 'static, T>(field: &T, fd: Outgoing<F>) -> Result<u32, FdError> {
    with(&SENDING, |sending: &mut Sending<F>| {
        // Both addresses are needed. A field that is gone leaves its address to the next one, and
        // two fields may share a descriptor. The references here keep the latter in use.
        let descriptor = match &fd {
            Outgoing::Given(fd) => Arc::as_ptr(fd).addr(),
            Outgoing::Lent(fd) => Arc::as_ptr(fd).addr(),
        };
        let number = sending.fds.len() as u32;
        match sending.numbers.entry((std::ptr::from_ref(field).addr(), descriptor)) {
            Entry::Occupied(known) => Ok(*known.get()),
            Entry::Vacant(new) => {
                sending.fds.push(fd);
                Ok(*new.insert(number))
            }
        }
    })
}

/// Claims a descriptor of the message that is being decoded, if `check` is content with it.
///
/// # Errors
/// If it is not, if the message has no such descriptor or has named it before, or if this thread
/// is not decoding a message with descriptors of this type.
pub(super) fn claim<F: 'static>(
    index: u32,
    check: impl FnOnce(&F) -> Result<(), FdError>,
) -> Result<Arc<Fds<F>>, FdError> {
    let fd = with(&RECEIVING, |slots: &mut Slots<F>| slots.claim(index))?;
    match check(&fd[0]) {
        Ok(()) => Ok(fd),
        Err(fault) => with(&RECEIVING, |_: &mut Slots<F>| Err(fault)),
    }
}

struct Sending<F> {
    fds: Vec<Outgoing<F>>,
    /// The number of each field's descriptor.
    numbers: HashMap<(usize, usize), u32>,
}

/// Acts on the message that is running, and notes an error.
fn with<S: 'static, R>(
    key: &'static LocalKey<State>,
    act: impl FnOnce(&mut S) -> Result<R, FdError>,
) -> Result<R, FdError> {
    key.with_borrow_mut(|running| {
        let Running { fds, fault } = running.as_mut().ok_or(FdError::NoCodec)?;
        let outcome = fds.downcast_mut().ok_or(FdError::NoCodec).and_then(act);
        outcome.inspect_err(|error| *fault = Some(error.clone()))
    })
}

/// The time of one call. Puts back what was there before when it is over.
struct Scope<S> {
    key: &'static LocalKey<State>,
    outer: Option<Running>,
    fds: PhantomData<S>,
}

impl<S: 'static> Scope<S> {
    fn enter(key: &'static LocalKey<State>, fds: S) -> Self {
        let running = Running { fds: Box::new(fds), fault: None };
        Self { key, outer: key.replace(Some(running)), fds: PhantomData }
    }

    fn leave(self) -> (S, Option<FdError>) {
        let Running { fds, fault } = self.key.take().expect("inner scopes have put it back");
        (*fds.downcast().expect("it is what was put there"), fault)
    }
}

impl<S> Drop for Scope<S> {
    fn drop(&mut self) {
        // What is dropped here, in a panic, may run code that uses a codec: outside of the borrow.
        drop(self.key.replace(self.outer.take()));
    }
}
