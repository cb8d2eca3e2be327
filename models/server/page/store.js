// What a reload keeps: in the tab's own storage, which ends with the tab.

const NAME = "chat-1";

// What was kept, or null: nothing, or something that this page did not write.
export const load = () => {
  try {
    return JSON.parse(sessionStorage.getItem(NAME));
  } catch {
    return null;
  }
};

// Whether it could be kept: storage may be full or forbidden.
export const save = (state) => {
  try {
    sessionStorage.setItem(NAME, JSON.stringify(state));
    return true;
  } catch {
    return false;
  }
};
