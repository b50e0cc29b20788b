//! What the threads of an engine share is made of these. In a build with `--cfg loom` they are loom's, which
//! tries every order that threads can come in, and every value that memory may show them; the models are in
//! modules of that name (`make test` runs them).

#[cfg(not(loom))]
pub(crate) use {
    arc_swap::ArcSwapOption,
    parking_lot::Mutex,
    std::sync::OnceLock,
    std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, Ordering, fence},
    std::thread_local,
};

#[cfg(loom)]
pub(crate) use {
    loom::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, Ordering, fence},
    loom::thread_local,
    substitute::{ArcSwapOption, Local, Mutex, OnceLock},
};

/// What loom does not have, or not like this; as much of it as is used.
#[cfg(loom)]
mod substitute {
    use std::cell::RefCell;
    use std::sync::Arc;
    use std::time::Duration;

    use loom::sync::MutexGuard;
    use loom::sync::atomic::{AtomicBool, Ordering};
    use loom::thread::LocalKey;

    /// What std's `LocalKey` does.
    pub(crate) trait Local<T: 'static> {
        fn with_borrow_mut<R>(&'static self, f: impl FnOnce(&mut T) -> R) -> R;

        fn replace(&'static self, value: T) -> T {
            self.with_borrow_mut(|old| std::mem::replace(old, value))
        }

        fn take(&'static self) -> T
        where
            T: Default,
        {
            self.replace(T::default())
        }
    }

    impl<T: 'static> Local<T> for LocalKey<RefCell<T>> {
        fn with_borrow_mut<R>(&'static self, f: impl FnOnce(&mut T) -> R) -> R {
            self.with(|cell| f(&mut cell.borrow_mut()))
        }
    }

    #[derive(Default)]
    pub(crate) struct Mutex<T>(loom::sync::Mutex<T>);

    impl<T> Mutex<T> {
        pub fn new(value: T) -> Self {
            Self(loom::sync::Mutex::new(value))
        }

        pub fn lock(&self) -> MutexGuard<'_, T> {
            self.0.lock().expect("not poisoned")
        }

        pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
            self.0.try_lock().ok()
        }

        /// However long: there is no time in a model.
        pub fn try_lock_for(&self, _: Duration) -> Option<MutexGuard<'_, T>> {
            Some(self.lock())
        }

        /// A hint only, which may be wrong when it is used: whoever asks tries the lock next.
        pub fn is_locked(&self) -> bool {
            false
        }
    }

    pub(crate) struct OnceLock<T> {
        set: AtomicBool,
        value: std::sync::OnceLock<T>,
    }

    impl<T> OnceLock<T> {
        pub fn new() -> Self {
            Self { set: AtomicBool::new(false), value: std::sync::OnceLock::new() }
        }

        pub fn get(&self) -> Option<&T> {
            self.set.load(Ordering::Acquire).then(|| self.value.get().expect("set"))
        }

        /// `make` must not wait for another thread.
        pub fn get_or_init(&self, make: impl FnOnce() -> T) -> &T {
            let value = self.value.get_or_init(make);
            self.set.store(true, Ordering::Release);
            value
        }
    }

    impl<T> Default for OnceLock<T> {
        fn default() -> Self {
            Self::new()
        }
    }

    /// A load is one step, and so is a store: that is what arc_swap promises.
    pub(crate) struct ArcSwapOption<T>(Mutex<Option<Arc<T>>>);

    impl<T> ArcSwapOption<T> {
        pub fn empty() -> Self {
            Self(Mutex::new(None))
        }

        pub fn load(&self) -> Guard<T> {
            Guard(self.load_full())
        }

        pub fn load_full(&self) -> Option<Arc<T>> {
            self.0.lock().clone()
        }

        pub fn store(&self, value: Option<Arc<T>>) {
            *self.0.lock() = value;
        }

        pub fn compare_and_swap(&self, current: &Arc<T>, new: Option<Arc<T>>) -> Guard<T> {
            let mut value = self.0.lock();
            let before = value.clone();
            if before.as_ref().is_some_and(|before| Arc::ptr_eq(before, current)) {
                *value = new;
            }
            Guard(before)
        }
    }

    pub(crate) struct Guard<T>(Option<Arc<T>>);

    impl<T> std::ops::Deref for Guard<T> {
        type Target = Option<Arc<T>>;

        fn deref(&self) -> &Self::Target {
            &self.0
        }
    }
}
