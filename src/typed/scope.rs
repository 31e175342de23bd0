//! The descriptors of the message that this thread is encoding or decoding.
//!
//! The methods of `Serialize` and `Deserialize` have no parameter for descriptors, so these are in
//! a thread-local variable. A codec sets it for the time of one call, and a guard clears it again,
//! even after a panic. If a codec is used inside the call of another one, it has its own scope.
//!
//! **No descriptor moves before the call has succeeded.** A scope only has further references to
//! the descriptors. So a message that can't be encoded keeps its descriptors, and the descriptors
//! of a message that can't be decoded stay in their slots.

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

/// The message of this thread. `None` if no codec is running.
type State = RefCell<Option<Running>>;

/// A message that is being encoded or decoded.
struct Running {
    /// [`Sending`] or [`Slots`], of the connection's type of descriptor.
    fds: Box<dyn Any>,
    /// The last error of a descriptor. The errors of serde's formats can only have a text, and
    /// `postcard` drops even that.
    fault: Option<FdError>,
}

thread_local! {
    static SENDING: State = const { RefCell::new(None) };
    static RECEIVING: State = const { RefCell::new(None) };
}

/// A descriptor of a message that is being encoded.
#[derive(Debug)]
pub(super) enum Outgoing<F> {
    /// A descriptor that moves with the message.
    Given(Arc<Fds<F>>),
    /// A descriptor that the sender keeps.
    Lent(Arc<F>),
}

/// The descriptors of a message that is being decoded. A slot is claimed while a field holds a
/// second reference to its descriptor. When serde tries the variants of an enum one after another,
/// it drops the fields of a variant that does not fit. Then the slot can be claimed again.
pub(super) struct Slots<F> {
    /// One slot for each descriptor that is known to belong to the message.
    claimable: Vec<Arc<Fds<F>>>,
    /// Further descriptors that may belong to the message, if the protocol does not count them.
    more: Option<FdQueue<F>>,
}

impl<F> Slots<F> {
    /// Returns the slots of a message that came with these descriptors.
    pub(super) fn counted(fds: Fds<F>) -> Self {
        Self { claimable: fds.split().map(Arc::new).collect(), more: None }
    }

    /// Returns the slots of a message in a protocol that does not count descriptors. The message
    /// has as many of the waiting descriptors as its fields name.
    #[cfg(feature = "json")]
    pub(super) fn waiting(fds: &mut FdQueue<F>) -> Self {
        Self { claimable: Vec::new(), more: Some(std::mem::take(fds)) }
    }

    /// Puts descriptors that were not claimed back into the queue. If the connection ends, the
    /// queue closes them away from the runtime.
    pub(super) fn give_back(self, fds: &mut FdQueue<F>) {
        if let Some(waiting) = self.more {
            *fds = waiting;
        }
        fds.extend(self.claimable.into_iter().filter_map(Arc::into_inner).flatten());
    }

    /// Claims the descriptor at a position.
    fn claim(&mut self, index: u32) -> Result<Arc<Fds<F>>, FdError> {
        // Make slots up to this position, if the protocol does not count descriptors.
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

    /// Checks that the message has named all of its descriptors.
    ///
    /// # Errors
    /// [`FdError::Unclaimed`] if it has not.
    fn check_all_claimed(&self) -> Result<(), FdError> {
        let count = self.claimable.iter().filter(|slot| Arc::strong_count(slot) == 1).count();
        if count == 0 { Ok(()) } else { Err(FdError::Unclaimed { count }) }
    }
}

/// Encodes a message by a call of `to_bytes`. Returns the bytes, and the descriptors of the
/// message.
///
/// # Errors
/// The error of a field, or else of `to_bytes`. The message keeps its descriptors.
pub(super) fn encode<F: 'static, B>(
    to_bytes: impl FnOnce() -> Result<B, TypedError>,
) -> Result<(B, Vec<Outgoing<F>>), TypedError> {
    let scope = Scope::enter(&SENDING, Sending::<F> { fds: Vec::new(), numbers: HashMap::new() });
    let outcome = to_bytes();
    let (sending, fault) = scope.leave();
    Ok((or_fault(outcome, fault)?, sending.fds))
}

/// Decodes a message by a call of `parse`. Returns the message or an error, and in both cases the
/// slots.
///
/// # Errors
/// The error of a descriptor, or else of `parse`. The slots then have all descriptors.
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

/// Replaces the error of a format by the error of a descriptor, which says more.
///
/// There may be a fault although the outcome is a message. It occurred in a variant of an enum that
/// serde has tried and given up, and does not count.
fn or_fault<T>(outcome: Result<T, TypedError>, fault: Option<FdError>) -> Result<T, TypedError> {
    outcome.map_err(|error| fault.map_or(error, TypedError::Fd))
}

/// Attaches a descriptor to the message that is being encoded, and returns its position. Some
/// serializers serialize a field twice, to compute the length first. The field then has one
/// position.
///
/// # Errors
/// If this thread is not encoding a message with descriptors of this type.
pub(super) fn attach<F: 'static, T>(field: &T, fd: Outgoing<F>) -> Result<u32, FdError> {
    with(&SENDING, |sending: &mut Sending<F>| {
        // A field is recognized by two addresses, its own and that of its descriptor. The first one
        // is not enough, because a field that is dropped leaves its address to the next one. The
        // second one is not enough, because two fields may share a descriptor. It is not used again
        // during the call, because `sending.fds` holds a reference.
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

/// Claims a descriptor of the message that is being decoded, if it passes `check`.
///
/// # Errors
/// The error of `check`. Other errors if the message has no such descriptor or has named it before,
/// or if this thread is not decoding a message with descriptors of this type.
pub(super) fn claim<F: 'static>(
    index: u32,
    check: impl FnOnce(&F) -> Result<(), FdError>,
) -> Result<Arc<Fds<F>>, FdError> {
    let fd = with(&RECEIVING, |slots: &mut Slots<F>| slots.claim(index))?;
    match check(&fd[0]) {
        Ok(()) => Ok(fd),
        // Record the error too: see `Running::fault`.
        Err(fault) => with(&RECEIVING, |_: &mut Slots<F>| Err(fault)),
    }
}

/// The descriptors of a message that is being encoded.
struct Sending<F> {
    fds: Vec<Outgoing<F>>,
    /// The position of each field's descriptor in `fds`. The key has the addresses of the field and
    /// of the descriptor.
    numbers: HashMap<(usize, usize), u32>,
}

/// Calls `act` with the descriptors of the current message, and records an error.
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

/// The scope of one call. When it ends, the scope that was there before is set again.
struct Scope<S> {
    key: &'static LocalKey<State>,
    /// The scope of a codec inside whose call this one runs.
    outer: Option<Running>,
    fds: PhantomData<S>,
}

impl<S: 'static> Scope<S> {
    fn enter(key: &'static LocalKey<State>, fds: S) -> Self {
        let running = Running { fds: Box::new(fds), fault: None };
        Self { key, outer: key.replace(Some(running)), fds: PhantomData }
    }

    fn leave(self) -> (S, Option<FdError>) {
        let Running { fds, fault } = self.key.take().expect("inner scopes have set it again");
        (*fds.downcast().expect("it is what was put there"), fault)
    }
}

impl<S> Drop for Scope<S> {
    fn drop(&mut self) {
        // After a panic, this drops a message, whose code may use a codec. So the variable is not
        // borrowed here.
        drop(self.key.replace(self.outer.take()));
    }
}
