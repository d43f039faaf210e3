--
-- What goes to Userpilot, said once for each table.  From here on every change
-- of a row goes out with its commit; only the columns named leave the database
--
CREATE TRIGGER to_userpilot AFTER INSERT OR UPDATE ON companies
	FOR EACH ROW EXECUTE FUNCTION userpilot_company_trigger(
	'id', 'name', 'address', 'country', 'registry', 'addresses');

CREATE TRIGGER to_userpilot AFTER INSERT OR UPDATE ON users
	FOR EACH ROW EXECUTE FUNCTION userpilot_user_trigger(
	'id', 'name', 'email', 'admin', 'signed_up AS created_at', 'company_id');
